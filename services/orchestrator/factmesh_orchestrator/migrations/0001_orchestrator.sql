-- The orchestrator's own state. The row of the business object is the lock; instances are only written under it.

-- What waits under a business object, and who is active on it. No index but the key: every update stays HOT.
CREATE TABLE business_objects (
    object_type      text   NOT NULL,
    object_id        text   NOT NULL,
    active           uuid[] NOT NULL DEFAULT '{}',
    active_workflows text[] NOT NULL DEFAULT '{}',
    waiting          bytea,                       -- compact JSON: kept early facts, queued starting facts
    PRIMARY KEY (object_type, object_id)
) WITH (fillfactor = 50);

-- One row an instance. `state` is compact JSON and the only thing that decisions read; the columns beside it repeat
-- what people look for. No index on anything that changes.
CREATE TABLE instances (
    id               uuid        PRIMARY KEY,
    workflow         text        NOT NULL,
    workflow_version text        NOT NULL,
    object_type      text        NOT NULL,
    object_id        text        NOT NULL,
    correlation_id   text        NOT NULL,
    started_at       timestamptz NOT NULL,
    due_by           timestamptz,
    seq              bigint      NOT NULL,
    status           text        NOT NULL,
    step             text,
    outcome          text,
    ended_at         timestamptz,
    state            bytea       NOT NULL
) WITH (fillfactor = 50);

-- What operators look for: parked and needs_resolution. Small, so that it may have the indexes that instances may not.
CREATE TABLE attention (
    instance_id uuid        PRIMARY KEY,
    status      text        NOT NULL,
    workflow    text        NOT NULL,
    step        text,
    reason      text,
    since       timestamptz NOT NULL
);
CREATE INDEX attention_since ON attention (since);

-- Deployed definitions: a version's content never changes; `policies` is what it was linted and compiled with.
CREATE TABLE definitions (
    name         text        NOT NULL,
    version      text        NOT NULL,
    content_hash text        NOT NULL,
    yaml         text        NOT NULL,
    policies     bytea       NOT NULL,
    is_current   boolean     NOT NULL,
    deployed_at  timestamptz NOT NULL DEFAULT now(),
    deployed_by  text        NOT NULL,
    commit_id    text        NOT NULL,
    PRIMARY KEY (name, version)
);
CREATE UNIQUE INDEX definitions_current ON definitions (name) WHERE is_current;

-- Who deployed what, when, from which commit. Rows are only added.
CREATE TABLE definition_acts (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT now(),
    act          text        NOT NULL,
    name         text        NOT NULL,
    version      text        NOT NULL,
    content_hash text        NOT NULL,
    by           text        NOT NULL,
    commit_id    text        NOT NULL
);

-- What the console and the command line may read.
CREATE VIEW instances_view AS
SELECT i.id, i.workflow, i.workflow_version, i.object_type, i.object_id, i.correlation_id, i.started_at, i.due_by, i.seq,
       i.status, i.step, i.outcome, i.ended_at, a.since AS attention_since, a.reason AS attention_reason
  FROM instances i LEFT JOIN attention a ON a.instance_id = i.id;
CREATE VIEW instance_states_view AS SELECT id, convert_from(state, 'UTF8')::json AS state FROM instances;
CREATE VIEW definitions_view AS
SELECT name, version, content_hash, is_current, deployed_at, deployed_by, commit_id FROM definitions;

-- One round trip for what takes three statements: create absent objects, lock them all in order, read what they hold.
-- Each statement of a volatile function has a snapshot of its own under READ COMMITTED, so the instances are read in
-- one that is younger than the wait for the locks. Of an object with `whole`, all active instances come; of the others
-- those in `wanted`.
CREATE FUNCTION load_objects(types text[], ids text[], whole boolean[], wanted uuid[])
RETURNS TABLE (object_type text, object_id text, active uuid[], active_workflows text[], instance_id uuid, state bytea)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO business_objects AS b (object_type, object_id)
    SELECT k.t, k.i FROM unnest(types, ids, whole) AS k (t, i, w) WHERE k.w ORDER BY k.t, k.i
    ON CONFLICT DO NOTHING;

    RETURN QUERY
    SELECT b.object_type, b.object_id, b.active, b.active_workflows, NULL::uuid, b.waiting
      FROM unnest(types, ids) AS k (t, i) JOIN business_objects b ON b.object_type = k.t AND b.object_id = k.i
     ORDER BY b.object_type, b.object_id
       FOR UPDATE OF b;

    RETURN QUERY
    SELECT i.object_type, i.object_id, NULL::uuid[], NULL::text[], i.id, i.state
      FROM instances i
     WHERE i.id = ANY (wanted || ARRAY(
               SELECT unnest(b.active) FROM unnest(types, ids, whole) AS k (t, o, w)
                 JOIN business_objects b ON b.object_type = k.t AND b.object_id = k.o
                WHERE k.w));
END $$;
