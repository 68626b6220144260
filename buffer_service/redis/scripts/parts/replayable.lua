-- requires: groups stock eviction hints

-- A group leaves `fresh`, or arrives late: its trajectories become replayable and its prompt's visit is complete.
local function make_replayable(m, q, gid, g)
  local s = load_prompt(g.prompt)
  local at = place_of(s)
  for i = 1, g.n do
    local tid, success, version = tid_of(gid, i - 1), g.successes[i], g.versions[i]
    put(m, 'trajs', tid, cmsgpack.pack({ g.prompt, success, version, (g.advantages or {})[i] or 0 }))
    stock_add(tid, g.prompt, success, version, at)
  end
  gate_visit(m, q, s, g)
end
