-- ARGV: "prompts" | "trajs" | "tickets", then fields of that hash. Rebuilds the derived sorted sets after a restore.
local names = {}
for i = 2, #ARGV do names[#names + 1] = ARGV[i] end
local records = call('HMGET', K(ARGV[1]), unpack(names))
for i, name in ipairs(names) do
  local r = cmsgpack.unpack(records[i])
  if ARGV[1] == 'prompts' then
    if score_of(r) then call('ZADD', K('rank'), score_of(r), name) end
    if r[7] == 1 then call('SADD', K('hints'), name) end
  elseif ARGV[1] == 'tickets' then
    pend(name, r)
  else
    stock_add(name, r, tonumber(call('ZSCORE', K('rank'), r[1])))
  end
end
return #names
