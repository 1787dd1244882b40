-- As before, without the statements that a batch of results does not need: they create no object, and name the
-- instances that they are about. A batch of one spends most of its time in starting statements.
CREATE OR REPLACE FUNCTION load_objects(types text[], ids text[], whole boolean[], wanted uuid[])
RETURNS TABLE (object_type text, object_id text, active uuid[], active_workflows text[], instance_id uuid, state bytea)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
BEGIN
    IF true = ANY (whole) THEN
        INSERT INTO business_objects AS b (object_type, object_id)
        SELECT k.t, k.i FROM unnest(types, ids, whole) AS k (t, i, w) WHERE k.w ORDER BY k.t, k.i
        ON CONFLICT DO NOTHING;
    END IF;

    RETURN QUERY
    SELECT b.object_type, b.object_id, b.active, b.active_workflows, NULL::uuid, b.waiting
      FROM unnest(types, ids) AS k (t, i) JOIN business_objects b ON b.object_type = k.t AND b.object_id = k.i
     ORDER BY b.object_type, b.object_id
       FOR UPDATE OF b;

    -- Each of these has a snapshot of its own, younger than the wait for the locks.
    IF true = ANY (whole) THEN
        wanted := wanted || ARRAY(
            SELECT unnest(b.active) FROM unnest(types, ids, whole) AS k (t, o, w)
              JOIN business_objects b ON b.object_type = k.t AND b.object_id = k.o
             WHERE k.w);
    END IF;
    IF wanted <> '{}' THEN
        RETURN QUERY
        SELECT i.object_type, i.object_id, NULL::uuid[], NULL::text[], i.id, i.state
          FROM instances i WHERE i.id = ANY (wanted);
    END IF;
END $$;
