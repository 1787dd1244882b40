"""Models of the design, small enough to be explored completely: each rule is a switch, and off it breaks a promise."""
