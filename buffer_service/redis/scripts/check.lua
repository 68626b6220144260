-- requires: groups requests stock books
-- Looks at everything that is stored: whether keys that belong together are there. Returns what is wrong, a text each.
-- O(stock + requests).
local m = meta()
local found = faults_of_counts()
local function fault(...) found[#found + 1] = string.format(...) end

local function missing(ids) -- how many of the trajectories have no record
  local there = 0
  for first = 1, #ids, 1000 do
    local keys = {}
    for i = first, math.min(first + 999, #ids) do keys[#keys + 1] = K('t:' .. ids[i]) end
    there = there + call('EXISTS', unpack(keys))
  end
  return #ids - there
end

local ids, of_prompt, all = {}, {}, call('HGETALL', K('trajs'))
for i = 1, #all, 2 do
  ids[#ids + 1] = all[i]
  local pid = unpack(cmsgpack.unpack(all[i + 1]))
  of_prompt[pid] = (of_prompt[pid] or 0) + 1
end
local gone = missing(ids)
if gone > 0 then fault('records of stored trajectories that are gone: %d', gone) end
for pid, n in pairs(of_prompt) do
  local listed = call('ZCARD', K('pt:' .. pid))
  if listed ~= n then fault('stored trajectories of prompt %s: %d against %d listed', pid, n, listed) end
  if call('HEXISTS', K('prompts'), pid) == 0 then fault('prompt %s has trajectories and no statistics', pid) end
end
for _, kind in ipairs({ 'f', 's' }) do
  local aged = 0
  for bin = -64, 64 do aged = aged + call('ZCARD', age_key(kind, bin)) end
  local stored = call('ZCARD', K('stock:' .. kind))
  if aged ~= stored then fault('stored trajectories of kind %s: %d against %d by age', kind, stored, aged) end
end

local waits, fresh = { steps = {}, rounds = {} }, {}
local function add(hash, field, n) waits[hash][field] = (waits[hash][field] or 0) + n end
for _, gid in ipairs(call('ZRANGE', K('fresh'), 0, -1)) do
  local raw = call('HGET', K('groups'), gid)
  if raw then
    local g = group(raw)
    add('steps', g.step, 1)
    for i = 0, g.n - 1 do fresh[#fresh + 1] = tid_of(gid, i) end
  end
end
gone = missing(fresh)
if gone > 0 then fault('records of fresh trajectories that are gone: %d', gone) end
for _, raw in ipairs(call('HVALS', K('tickets'))) do
  local r = request(raw)
  if r.kind == 'eval' then add('rounds', r.round, 1) elseif r.step > m.trained then add('steps', r.step, 1) end
end
local function same(hash, field, has, expected)
  if has ~= expected then
    fault('what %s %s waits for: %d against %d expected', string.sub(hash, 1, -2), field, has, expected)
  end
end
for hash, fields in pairs(waits) do
  for field, n in pairs(fields) do
    if call('HEXISTS', K(hash), field) == 0 then same(hash, field, n, 0) end
  end
  local told = call('HGETALL', K(hash))
  for i = 1, #told, 2 do
    local n = fields[tonumber(told[i])] or 0
    if hash == 'rounds' then n = n + call('HLEN', K('eval:' .. told[i])) end
    if hash == 'rounds' or tonumber(told[i]) > m.trained then same(hash, told[i], n, tonumber(told[i + 1])) end
  end
end
return found
