-- Who holds an idempotency key (INV-K). Ids of ours tell their own day, so old keys go by a range.
CREATE TABLE keys (
    idempotency_key uuid  PRIMARY KEY,
    command_id      uuid  NOT NULL,
    body_hash       bytea NOT NULL
) WITH (fillfactor = 90);

-- Every call and every question that went out, with its duration (REQUIREMENTS C7): appended, never changed.
CREATE TABLE calls (
    command_id uuid        NOT NULL,
    epoch      integer     NOT NULL,
    ordinal    smallint    NOT NULL,
    operation  text        NOT NULL,
    what       text        NOT NULL,                        -- call, ask
    at         timestamptz NOT NULL,
    ms         integer     NOT NULL,
    ended      text        NOT NULL,                        -- done, or the class of the error
    PRIMARY KEY (command_id, epoch, ordinal)
);
