-- What is said of a fact to the one who sent it. Read by its correlation id only; no index on anything that changes.
CREATE TABLE progress (
    correlation_id       uuid        PRIMARY KEY,
    source               text        NOT NULL,
    source_id            text        NOT NULL,
    type                 text        NOT NULL,
    stage                text        NOT NULL CHECK (stage IN ('accepted', 'quarantined')),
    business_object_type text,
    business_object_id   text,
    due_by               timestamptz,
    reason               text,
    received_at          timestamptz NOT NULL DEFAULT now(),
    updated_at           timestamptz NOT NULL DEFAULT now(),
    day                  date        NOT NULL DEFAULT current_date
) WITH (fillfactor = 70);
CREATE INDEX progress_day ON progress (day);

-- What the status topic says of each instance that a fact started; several workflows may await one type of fact.
CREATE TABLE progress_instances (
    correlation_id uuid        NOT NULL,
    instance_id    uuid        NOT NULL,
    instance_seq   bigint      NOT NULL,
    workflow       text        NOT NULL,
    status         text        NOT NULL,
    step           text,
    next_step      text,
    outcome        text,
    reason         text,
    due_by         timestamptz,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    day            date        NOT NULL DEFAULT current_date,
    PRIMARY KEY (correlation_id, instance_id)
) WITH (fillfactor = 50);
CREATE INDEX progress_instances_day ON progress_instances (day);
