CREATE TABLE thing (key text PRIMARY KEY, n integer NOT NULL, last text);
