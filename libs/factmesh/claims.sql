-- name: schedule
-- Rows to work on later. A row that is there stays as it is, unless it ended `failed`: then it starts over, and the
-- raised epoch shuts out whoever still holds the old one.
INSERT INTO claims (id, kind, state, due_at, epoch, attempts, tag, payload)
SELECT s.id, s.kind, 'pending', coalesce(s.due_at, now()), 0, 0, s.tag, s.payload
  FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::uuid[], $5::bytea[]) AS s (id, kind, due_at, tag, payload)
 ORDER BY s.id
ON CONFLICT (id) DO UPDATE
   SET state = 'pending', due_at = excluded.due_at, epoch = claims.epoch + 1, attempts = 0, payload = excluded.payload,
       tag = excluded.tag, progress = NULL, outcome = NULL, settled_at = NULL, lease_ended_at = NULL
 WHERE claims.state = 'failed'
RETURNING id, due_at;

-- name: start
-- As `schedule`, already claimed by this process for $5 seconds: an undisturbed command costs no claiming commit.
INSERT INTO claims (id, kind, state, due_at, epoch, attempts, tag, payload)
SELECT s.id, $2, 'leased', now() + make_interval(secs => $5), 1, 1, s.tag, s.payload
  FROM unnest($1::uuid[], $3::uuid[], $4::bytea[]) AS s (id, tag, payload)
 ORDER BY s.id
ON CONFLICT (id) DO UPDATE
   SET state = 'leased', due_at = excluded.due_at, epoch = claims.epoch + 1, attempts = 1, payload = excluded.payload,
       tag = excluded.tag, progress = NULL, outcome = NULL, settled_at = NULL, lease_ended_at = NULL
 WHERE claims.state = 'failed'
RETURNING id, epoch, created_at, now() AS claimed_at;

-- name: start_fresh
-- As `start`, where no row should be there: one that is raises a unique violation, and nothing of the batch stays.
WITH fresh AS (
    INSERT INTO claims (id, kind, state, due_at, epoch, attempts, tag, payload)
    SELECT s.id, $2, 'leased', now() + make_interval(secs => $5), 1, 1, s.tag, s.payload
      FROM unnest($1::uuid[], $3::uuid[], $4::bytea[]) AS s (id, tag, payload)
     ORDER BY s.id
)
SELECT now() AS claimed_at;

-- name: unschedule
-- Takes back what is not settled; a worker that holds it settles in vain.
DELETE FROM claims WHERE kind = $1 AND id = ANY ($2::uuid[]) AND state IN ('pending', 'leased');

-- name: amend
-- A person's word settles a row, from the expected state only; the raised epoch makes its result a new one.
UPDATE claims c
   SET state = a.state, epoch = c.epoch + 1, progress = coalesce(a.progress, c.progress),
       due_at = CASE a.state WHEN 'pending' THEN now() END, outcome = NULL, attempts = CASE a.state WHEN 'pending' THEN 0 ELSE c.attempts END,
       settled_at = CASE a.state WHEN 'pending' THEN NULL ELSE now() END
  FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[]) AS a (id, kind, expected, state, progress)
 WHERE c.id = a.id AND c.kind = a.kind AND c.state = a.expected
RETURNING c.id;

-- name: lock
-- Rows that a message is about, locked until its transaction ends. Sorted: no deadlock.
SELECT id, kind, state, epoch, attempts, payload, progress, created_at, settled_at, lease_ended_at, now() AS at
  FROM claims WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE;

-- name: claim_due
-- Due rows for this process: nobody waits for a row that another replica holds. PostgreSQL's clock judges.
-- A leased row that is due was lost by its worker.
WITH due AS (
    SELECT id, state AS was, due_at AS was_due_at FROM claims
     WHERE kind = $1 AND due_at <= now() AND state IN ('pending', 'leased')
     ORDER BY due_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE claims c
   SET state = 'leased', epoch = c.epoch + 1, attempts = c.attempts + 1,
       lease_ended_at = CASE WHEN due.was = 'leased' THEN due.was_due_at ELSE c.lease_ended_at END,
       due_at = now() + make_interval(secs => $3)
  FROM due WHERE c.id = due.id
RETURNING c.id, c.kind, due.was, c.epoch, c.attempts, c.tag, c.payload, c.progress, c.created_at,
          now() AS claimed_at, c.lease_ended_at;

-- name: next_due
-- Seconds until something of a kind is due, by PostgreSQL's clock; NULL for nothing. $2: batches in our own hands.
SELECT extract(epoch FROM min(due_at) - now())::double precision
  FROM (SELECT min(due_at) AS due_at FROM claims
         WHERE kind = $1 AND due_at IS NOT NULL AND state IN ('pending', 'leased')
         UNION ALL
        SELECT due_at FROM unpublished WHERE kind = $1 AND id <> ALL ($2::bigint[])) AS next;

-- name: settle
-- From the current epoch only (INV-F): a worker that was paused past its lease changes nothing. `counted` and `epochs`
-- are NULL where every row counted; only what counted may be published. Until it is known to be, `batch` is due: one
-- row for all that is settled together. $9: batches that are acknowledged meanwhile. What a kind saves is added to it.
WITH settled AS (
    UPDATE claims c
       SET state = s.state, due_at = CASE WHEN s.state = 'pending' THEN coalesce(s.due_at, now()) END,
           progress = s.progress, outcome = s.outcome, lease_ended_at = now(),
           settled_at = CASE WHEN s.state <> 'pending' THEN now() END
      FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::timestamptz[], $5::bytea[], $6::bytea[])
           AS s (id, epoch, state, due_at, progress, outcome)
     WHERE c.id = s.id AND c.epoch = s.epoch AND c.state = 'leased'
    RETURNING c.id, c.epoch, c.outcome IS NOT NULL AS tells
), told AS (
    INSERT INTO unpublished (kind, due_at, ids, epochs)
    SELECT $7, now() + make_interval(secs => $8), array_agg(id), array_agg(epoch)
      FROM settled WHERE tells HAVING count(*) > 0
    RETURNING id
), published AS (
    DELETE FROM unpublished WHERE id = ANY ($9::bigint[])
), counted AS (
    SELECT id, epoch FROM settled
) /* along */
SELECT (SELECT id FROM told) AS batch,
       CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(id), '{}') END AS counted,
       CASE WHEN count(*) < cardinality($1::uuid[]) THEN coalesce(array_agg(epoch), '{}') END AS epochs
  FROM counted;

-- name: claim_unpublished
-- Batches whose outcomes are not known to be published, for this process until the grace has passed once more.
-- A row that has changed since, by a person's word or because it started over, has its own outcome. $4: in our hands.
WITH due AS (
    SELECT id FROM unpublished WHERE kind = $1 AND due_at <= now() AND id <> ALL ($4::bigint[])
     ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE unpublished u SET due_at = now() + make_interval(secs => $3) FROM due WHERE u.id = due.id
    RETURNING u.id, u.ids, u.epochs
)
SELECT t.id AS batch,
       (SELECT array_agg(c.outcome)
          FROM unnest(t.ids, t.epochs) AS r (id, epoch)
          JOIN claims c ON c.id = r.id AND c.epoch = r.epoch
         WHERE c.state NOT IN ('pending', 'leased') AND c.outcome IS NOT NULL) AS outcomes
  FROM taken t;

-- name: release
-- A clean stop gives back what it did not begin: due at once, the attempt not counted. A row whose earlier lease was lost
-- stays `leased`, so that whoever takes it still knows that a call may be out there.
UPDATE claims c
   SET state = CASE WHEN r.interrupted THEN 'leased' ELSE 'pending' END,
       due_at = now(), attempts = greatest(c.attempts - 1, 0)
  FROM unnest($1::uuid[], $2::integer[], $3::boolean[]) AS r (id, epoch, interrupted)
 WHERE c.id = r.id AND c.epoch = r.epoch AND c.state = 'leased';

-- name: counts
-- How many rows of each kind are in each state, for metrics; `late_s` is how long the oldest due one has waited.
SELECT kind, state, count(*) AS n, max(extract(epoch FROM now() - due_at)) FILTER (WHERE due_at <= now()) AS late_s
  FROM claims WHERE due_at IS NOT NULL GROUP BY kind, state
UNION ALL
SELECT kind, state, count(*), NULL FROM claims WHERE state = 'unknown' AND due_at IS NULL GROUP BY kind, state
UNION ALL
SELECT kind, 'unpublished', sum(cardinality(ids)), max(extract(epoch FROM now() - due_at)) FILTER (WHERE due_at <= now())
  FROM unpublished GROUP BY kind;

-- name: expire
-- Settled and published rows live for the horizon; an unknown one lives until somebody resolves it.
DELETE FROM claims
 WHERE state IN ('done', 'failed') AND due_at IS NULL AND settled_at < now() - make_interval(days => $1)
   AND settled_at < coalesce((SELECT min(settled_at) FROM unpublished), 'infinity');

-- name: outcomes_since
-- What settlements emitted since an instant, in a stable order, a page at a time.
SELECT id, settled_at, outcome FROM claims
 WHERE settled_at >= $1 AND outcome IS NOT NULL AND (settled_at, id) > ($2, $3)
 ORDER BY settled_at, id LIMIT $4;

-- name: count_outcomes_since
-- How many rows `outcomes_since` will give.
SELECT count(*) FROM claims WHERE settled_at >= $1 AND outcome IS NOT NULL;
