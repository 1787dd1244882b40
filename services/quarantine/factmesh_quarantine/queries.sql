-- name: list
-- Records by any mix of filters, oldest death first; what is NULL does not filter.
SELECT r.*, (SELECT a.by FROM act a WHERE a.record = r.id ORDER BY a.id DESC LIMIT 1) AS last_by,
       octet_length(r.original) AS original_bytes
  FROM record r
 WHERE ($1::uuid[] IS NULL OR r.id = ANY ($1))
   AND ($2::text IS NULL OR strpos(r.topic, $2) > 0)
   AND ($3::text IS NULL OR r.reason = $3)
   AND ($4::text IS NULL OR starts_with(r.fingerprint, $4))
   AND ($5::uuid IS NULL OR r.instance_id = $5)
   AND ($6::text[] IS NULL OR r.state = ANY ($6))
   AND ($7::timestamptz IS NULL OR r.failed_at >= $7)
   AND ($8::text IS NULL OR r.workflow = $8)
   AND ($9::text IS NULL OR r.owner = $9)
 ORDER BY r.failed_at, r.id
 LIMIT $10;

-- name: groups
-- One line a cause, the largest first, over the same filters.
SELECT r.fingerprint, r.reason, r.stage, r.step, count(*) AS records, min(r.failed_at) AS oldest,
       max(r.failed_at) AS newest, min(r.message) AS example, array_agg(DISTINCT r.topic) AS topics
  FROM record r
 WHERE ($1::uuid[] IS NULL OR r.id = ANY ($1))
   AND ($2::text IS NULL OR strpos(r.topic, $2) > 0)
   AND ($3::text IS NULL OR r.reason = $3)
   AND ($4::text IS NULL OR starts_with(r.fingerprint, $4))
   AND ($5::uuid IS NULL OR r.instance_id = $5)
   AND ($6::text[] IS NULL OR r.state = ANY ($6))
   AND ($7::timestamptz IS NULL OR r.failed_at >= $7)
   AND ($8::text IS NULL OR r.workflow = $8)
   AND ($9::text IS NULL OR r.owner = $9)
 GROUP BY r.fingerprint, r.reason, r.stage, r.step
 ORDER BY records DESC, r.fingerprint
 LIMIT $10;

-- name: by_prefix
-- The records whose id begins so: people type the first characters, of the name by which its instance knows it too.
SELECT id FROM record WHERE starts_with(id::text, $1) OR starts_with(thread::text, $1) ORDER BY id LIMIT 2;

-- name: history
-- One record's audit, oldest first.
SELECT at, by, event, number, before, after, detail FROM history WHERE record = $1 ORDER BY id;

-- name: acts
-- One record's acts, oldest first.
SELECT verb, number, by, reason, operation, raised_at, published_at, died_at FROM act WHERE record = $1 ORDER BY id;

-- name: owners
-- Who has how many records in which state.
SELECT owner, state, count(*) AS records FROM record GROUP BY owner, state ORDER BY owner, state;

-- name: success
-- Of the openings that were published, how many did not die again. Discards bring nothing back.
SELECT count(*) AS published, count(*) FILTER (WHERE died_at IS NOT NULL) AS died,
       count(*) FILTER (WHERE published_at IS NULL) AS due
  FROM act WHERE verb IN ('replay', 'retry_step', 'resolve') AND ($1::timestamptz IS NULL OR raised_at >= $1);

-- name: recovery
-- From the first failure to the act after which the record did not come back, in seconds.
SELECT count(*) AS records, avg(extract(epoch FROM closed_at - first_failed_at))::float8 AS mean_s,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM closed_at - first_failed_at)) AS median_s,
       max(extract(epoch FROM closed_at - first_failed_at))::float8 AS longest_s
  FROM record
 WHERE state IN ('replayed', 'resolved') AND closed_at IS NOT NULL AND ($1::timestamptz IS NULL OR closed_at >= $1);
