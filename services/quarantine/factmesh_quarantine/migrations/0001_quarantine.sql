-- The quarantine index: what lies on the DLQ topics, what people did about it, and what is still to be published for it.

-- Numbers of openings count per root id and group (DESIGN section 9); the id is `ids.record_id(root, group)`, the name
-- by which instances know the record.
CREATE TABLE thread (
    id      uuid    PRIMARY KEY,
    counter integer NOT NULL DEFAULT 0 CHECK (counter >= 0)
);

-- One row a quarantined message; a conflict and the message that it fought over are two records of one thread.
CREATE TABLE record (
    id                   uuid        PRIMARY KEY,    -- factmesh-dlq-id of the first death
    thread               uuid        NOT NULL REFERENCES thread,
    root                 bytea       NOT NULL,       -- UTF-8, as bytes: a stranger's id may hold what text cannot
    grp                  text        NOT NULL,
    state                text        NOT NULL
                         CHECK (state IN ('open', 'replayed', 'resolved', 'discarded', 'failed_again')),
    raised               integer     NOT NULL,
    published            integer     NOT NULL,
    dead                 integer     NOT NULL,
    owner                text        NOT NULL,
    topic                text        NOT NULL,       -- of the latest death, like everything down to `failed_at`
    partition            integer     NOT NULL,
    "offset"             bigint      NOT NULL,
    reason               text        NOT NULL,
    error_class          text        NOT NULL,
    stage                text        NOT NULL,
    step                 text,
    exception_type       text        NOT NULL,
    fingerprint          text        NOT NULL,
    message              text        NOT NULL,
    stack                text,
    attempts             integer     NOT NULL,
    service              text        NOT NULL,
    service_version      text        NOT NULL,
    first_failed_at      timestamptz NOT NULL,
    failed_at            timestamptz NOT NULL,
    instance_id          uuid,
    correlation_id       text,
    trace_id             text,
    command_id           uuid,
    business_object_type text,
    business_object_id   text,
    kind                 text,                       -- the record's name, where it can be decoded
    workflow             text,
    original             bytea,                      -- message.pack_delivery(); NULL once closed and past retention
    correction           bytea,                      -- message.pack() of one emission: value and headers as corrected
    corrected_by         text,
    corrected_at         timestamptz,
    opened_at            timestamptz NOT NULL,       -- when the latest death reached the index
    closed_at            timestamptz,                -- when a person's act took it out of the open ones
    created_at           timestamptz NOT NULL DEFAULT now(),
    -- The three numbers only rise; a record is open iff raised = dead and it is not discarded.
    CHECK (published <= raised AND dead <= raised),
    CHECK ((state IN ('open', 'failed_again')) = (raised = dead AND state <> 'discarded'))
);
CREATE INDEX record_thread ON record (thread);
CREATE INDEX record_instance ON record (instance_id) WHERE instance_id IS NOT NULL;
CREATE INDEX record_open ON record (fingerprint, opened_at) WHERE state IN ('open', 'failed_again');

-- Only rising numbers: whatever statement a person or a bug writes, a number that falls is refused.
CREATE FUNCTION numbers_only_rise() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.raised < OLD.raised OR NEW.published < OLD.published OR NEW.dead < OLD.dead THEN
        RAISE EXCEPTION 'record %: raised, published and dead only rise', OLD.id USING ERRCODE = '23514';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER record_numbers BEFORE UPDATE ON record FOR EACH ROW EXECUTE FUNCTION numbers_only_rise();

-- Every death that was filed: a redelivery, by whichever reader, is told by its factmesh-dlq-id.
CREATE TABLE death (
    id        uuid        PRIMARY KEY,
    record    uuid        NOT NULL REFERENCES record,
    opening   integer     NOT NULL,
    topic     text        NOT NULL,                  -- where the DLQ record lies
    partition integer     NOT NULL,
    "offset"  bigint      NOT NULL,
    filed_at  timestamptz NOT NULL DEFAULT now()
);

-- Acts of people, with the bytes that carry them: written before they are published, due until they are.
CREATE TABLE act (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record       uuid        NOT NULL REFERENCES record,
    thread       uuid        NOT NULL REFERENCES thread,
    verb         text        NOT NULL CHECK (verb IN ('replay', 'retry_step', 'resolve', 'discard', 'give_up')),
    number       integer     NOT NULL,               -- the opening raised; of a discard, the opening that it ends
    bytes        bytea,                              -- message.pack(); NULL where there is nobody to tell, or long ago
    by           text        NOT NULL,
    reason       text        NOT NULL,
    operation    uuid,
    raised_at    timestamptz NOT NULL,
    published_at timestamptz,
    died_at      timestamptz
);
-- Two operators, or a killed tool, give at most one opening under a number.
CREATE UNIQUE INDEX act_number ON act (thread, number) WHERE verb <> 'discard';
CREATE UNIQUE INDEX act_discard ON act (record) WHERE verb = 'discard';
CREATE INDEX act_due ON act (id) WHERE published_at IS NULL;

-- The audit: who did what, when and why, and the record's state before and after.
CREATE TABLE history (
    id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record  uuid        NOT NULL REFERENCES record,
    at      timestamptz NOT NULL,
    by      text        NOT NULL,
    event   text        NOT NULL,
    number  integer     NOT NULL,
    before  text,
    after   text        NOT NULL,
    detail  text        NOT NULL DEFAULT ''
);
CREATE INDEX history_record ON history (record, id);

-- A bulk act has an id, a frozen cohort and an outcome for each member: it can be stopped and taken up again.
CREATE TABLE operation (
    id          uuid        PRIMARY KEY,
    verb        text        NOT NULL,
    by          text        NOT NULL,
    reason      text        NOT NULL,
    filter      text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE operation_item (
    operation uuid    NOT NULL REFERENCES operation ON DELETE CASCADE,
    position  integer NOT NULL,
    record    uuid    NOT NULL REFERENCES record,
    outcome   text    CHECK (outcome IN ('raised', 'skipped')),
    detail    text    NOT NULL DEFAULT '',
    PRIMARY KEY (operation, position)
);

-- How far each DLQ partition is filed, so that the tool knows from where to read on, with or without the service.
CREATE TABLE progress (
    topic       text    NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL,
    PRIMARY KEY (topic, partition)
);
