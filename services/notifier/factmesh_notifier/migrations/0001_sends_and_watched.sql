-- Every attempt to notify, with its duration and end: appended, never changed. Who was told is kept as a hash only (F5).
CREATE TABLE sends (
    id              uuid        NOT NULL,                   -- of the command, or of the notice to an owner
    epoch           integer     NOT NULL,
    channel         text        NOT NULL,
    template        text        NOT NULL,
    recipients      smallint    NOT NULL,
    recipients_hash bytea       NOT NULL,
    at              timestamptz NOT NULL,
    ms              integer     NOT NULL,
    ended           text        NOT NULL,                   -- done, or the class of the error
    PRIMARY KEY (id, epoch)
);

-- The highest sequence number seen of instances whose owners are told of their states.
CREATE TABLE watched (
    instance_id uuid   PRIMARY KEY,
    seq         bigint NOT NULL DEFAULT -1
) WITH (fillfactor = 50);
