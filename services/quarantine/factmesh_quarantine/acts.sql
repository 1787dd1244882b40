-- name: read
-- One record with its thread's counter and its last act, as it is now; nothing is locked.
SELECT r.*, t.counter,
       (SELECT a.by FROM act a WHERE a.record = r.id ORDER BY a.id DESC LIMIT 1) AS last_by
  FROM record r JOIN thread t ON t.id = r.thread WHERE r.id = $1;

-- name: raise_opening
-- One conditional update: of all who raise number $3 for this record, one does, and its bytes are stored before they are
-- published. Nobody raises a record that is not open, or that changed since it was read.
WITH counted AS (
    UPDATE thread SET counter = $3 WHERE id = $2 AND counter = $3 - 1 RETURNING id
), raised AS (
    UPDATE record SET raised = $3, state = $5, closed_at = $9
     WHERE id = $1 AND state = $4 AND raised = dead AND dead = $12 AND EXISTS (SELECT 1 FROM counted)
    RETURNING id
), acted AS (
    INSERT INTO act (record, thread, verb, number, bytes, by, reason, operation, raised_at)
    SELECT id, $2, $6, $3, $7, $8, $10, $11, $9 FROM raised
    RETURNING id
), noted AS (
    INSERT INTO history (record, at, by, event, number, before, after, detail)
    SELECT id, $9, $8, $6, $3, $4, $5, $10 FROM raised
)
SELECT id FROM acted;

-- name: discard
-- One conditional update of an open record; the signal that tells its instance is due until it is published.
WITH closed AS (
    UPDATE record SET state = $4, closed_at = $8
     WHERE id = $1 AND state = $3 AND raised = dead AND dead = $5
    RETURNING id
), acted AS (
    INSERT INTO act (record, thread, verb, number, bytes, by, reason, operation, raised_at, published_at)
    SELECT id, $2, 'discard', $5, $6, $7, $9, $10, $8, CASE WHEN $6::bytea IS NULL THEN $8 END FROM closed
    RETURNING id
), noted AS (
    INSERT INTO history (record, at, by, event, number, before, after, detail)
    SELECT id, $8, $7, 'discard', $5, $3, $4, $9 FROM closed
)
SELECT id FROM acted;

-- name: correct
-- The corrected bytes beside the original, only while the record is open and nobody else corrected it meanwhile.
WITH corrected AS (
    UPDATE record SET correction = $2, corrected_by = $3, corrected_at = $4
     WHERE id = $1 AND state IN ('open', 'failed_again') AND corrected_at IS NOT DISTINCT FROM $5
    RETURNING id, state, dead
), noted AS (
    INSERT INTO history (record, at, by, event, number, before, after, detail)
    SELECT id, $4, $3, 'correct', dead, state, state, $6 FROM corrected
)
SELECT id FROM corrected;

-- name: assign
-- The owner of a record, in any state.
WITH old AS (
    SELECT id, state, dead, owner FROM record WHERE id = $1 FOR UPDATE
), changed AS (
    UPDATE record r SET owner = $2 FROM old WHERE r.id = old.id RETURNING r.id
), noted AS (
    INSERT INTO history (record, at, by, event, number, before, after, detail)
    SELECT o.id, $4, $3, 'assign', o.dead, o.state, o.state, o.owner || ' -> ' || $2 FROM old o
)
SELECT id FROM changed;

-- name: due
-- Acts that are not published yet, oldest first, each taken by one publisher; a publisher that dies lets go of them.
SELECT id, record, number, verb, bytes FROM act
 WHERE published_at IS NULL AND raised_at <= $1 ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED;

-- name: take
-- One act, unless another publishes it at this moment or did.
SELECT id, record, number, verb, bytes FROM act WHERE id = $1 AND published_at IS NULL FOR UPDATE SKIP LOCKED;

-- name: published
-- They are acknowledged; the record's number only rises.
WITH done AS (
    UPDATE act SET published_at = $2 WHERE id = ANY ($1::bigint[]) RETURNING record, number, verb
)
UPDATE record r SET published = greatest(r.published, d.number)
  FROM (SELECT record, max(number) AS number FROM done WHERE verb <> 'discard' GROUP BY record) d
 WHERE r.id = d.record;

-- name: insert_operation
-- A bulk act under an id, so that it can be taken up again.
INSERT INTO operation (id, verb, by, reason, filter, created_at) VALUES ($1, $2, $3, $4, $5, $6);

-- name: insert_items
-- Its cohort, frozen.
INSERT INTO operation_item (operation, position, record)
SELECT $1, i.position, i.record FROM unnest($2::uuid[]) WITH ORDINALITY AS i (record, position);

-- name: read_operation
-- What it was to do.
SELECT id, verb, by, reason, filter, created_at FROM operation WHERE id = $1;

-- name: take_item
-- The next member that nobody has worked on, locked until this transaction ends: two operators share a cohort.
SELECT position, record FROM operation_item
 WHERE operation = $1 AND outcome IS NULL ORDER BY position LIMIT 1 FOR UPDATE SKIP LOCKED;

-- name: finish_item
-- In the transaction that raised: a member is never raised without its outcome, nor the reverse.
UPDATE operation_item SET outcome = $3, detail = $4 WHERE operation = $1 AND position = $2;

-- name: count_items
-- How far it is.
SELECT count(*) AS total, count(*) FILTER (WHERE outcome = 'raised') AS raised,
       count(*) FILTER (WHERE outcome = 'skipped') AS skipped
  FROM operation_item WHERE operation = $1;
