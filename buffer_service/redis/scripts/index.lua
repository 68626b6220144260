-- requires: prompts requests stock
-- ARGV: "prompts" | "trajs" | "tickets", then fields of that hash. Rebuilds the derived sorted sets after a restore.
local function index_prompt(pid, raw)
  local s = unpack_prompt(raw)
  if score_of(s) then call('ZADD', K('rank'), score_of(s), pid) end
  if s.hint_on == 1 then call('SADD', K('hints'), pid) end
end
local places = {} -- of the prompts of this call
local function index_trajectory(tid, raw)
  local pid, success, version = unpack(cmsgpack.unpack(raw))
  places[pid] = places[pid] or place_of(load_prompt(pid))
  stock_add(tid, pid, success, version, places[pid])
end
local function index_request(rkey, raw) pend(rkey, request(raw)) end

local index = ({ prompts = index_prompt, trajs = index_trajectory, tickets = index_request })[ARGV[1]]
local records = call('HMGET', K(ARGV[1]), unpack(ARGV, 2))
for i, raw in ipairs(records) do index(ARGV[i + 1], raw) end
return #records
