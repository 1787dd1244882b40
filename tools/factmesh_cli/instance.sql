-- name: is_there
-- NULL where the orchestrator never started in this schema.
SELECT to_regclass('instances_view')::text;

-- name: list
-- Instances by what a person looks for, newest first; a filter that is NULL does not judge.
SELECT * FROM instances_view
 WHERE ($1::text[] IS NULL OR status = ANY ($1)) AND ($2::text IS NULL OR workflow = $2)
   AND ($3::text IS NULL OR object_id = $3) AND ($4::text IS NULL OR correlation_id = $4)
   AND (NOT $5::boolean OR attention_since IS NOT NULL)
 ORDER BY id DESC LIMIT $6;

-- name: counts
-- How many instances of each workflow version show each status.
SELECT workflow, workflow_version, status, count(*) AS n FROM instances_view GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;

-- name: find
-- Instances whose id begins with some characters; two are enough to know that it is not one.
SELECT * FROM instances_view WHERE id::text LIKE $1 || '%' ORDER BY id LIMIT 2;

-- name: state
-- One instance as decisions see it.
SELECT state FROM instance_states_view WHERE id = $1;
