-- Rows of unknown outcome, which the gauges look for every few seconds: with nothing due they were found by reading the
-- whole table, 150 ms at 3 x 10^5 rows. Few rows, hence a small index; a settlement changes `due_at`, so no update that
-- was HOT before is none now.
CREATE INDEX claims_unknown ON claims (kind) WHERE state = 'unknown';
