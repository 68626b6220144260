-- ARGV: consumer, count, lease ms, max staleness, nonce, completions at most (0: any). Returns {tkey, packed ticket, hinted}
-- per lease. A repeat with the same nonce (a lost reply) gets the same leases back.
local m, now = meta(), now_ms()
local consumer, want, lease_ms, bound, nonce = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local budget, full = tonumber(ARGV[6]), false
local out, names = {}, {}

local last = call('HGET', K('lastlease'), consumer)
if last then
  local said = cmsgpack.unpack(last)
  if said[1] == nonce then
    for i = 2, #said do
      local raw = call('HGET', K('tickets'), said[i][1])
      if raw and cmsgpack.unpack(raw)[9] == said[i][2] then out[#out + 1] = { said[i][1], raw, said[i][3] } end
    end
    return out
  end
end

-- The hint of a prompt comes on when it stays Hard and the policy has stopped exploring, or stays at zero (docs/method.md 1.4).
local function hinted(t)
  if t[4] == 'eval' or m.hints == 0 then return 0 end
  local raw = call('HGET', K('prompts'), t[1])
  if not raw then return 0 end
  local state = cmsgpack.unpack(raw)
  local still = m.kl and m.kl < m.kl_below and state[5] >= m.hard_patience
  if state[7] == 0 and (still or state[6] >= m.zero_patience) then
    state[7], state[8] = 1, t[8]
    put(m, 'prompts', t[1], cmsgpack.pack(state))
    call('SADD', K('hints'), t[1])
    count('hints_fired', 1)
  end
  return state[7]
end

local function take(tkey)
  local t = cmsgpack.unpack(call('HGET', K('tickets'), tkey))
  if full or t[7] > m.version then return end
  if call('HEXISTS', K('quarantine'), t[1]) == 1 then
    drop_ticket(m, tkey, t)
    call('HINCRBY', K(t[4] == 'eval' and 'rounds' or 'steps'), t[4] == 'eval' and t[5] or t[2], -1)
    if t[4] == 'train' then
      call('SETBIT', K('seen'), t[8], 1)
      count('generated', 1)
      count('dropped:quarantined_prompt', 1)
    end
    return
  end
  if ARGV[6] ~= '0' then
    full = t[6] > budget -- a smaller ticket behind does not overtake: it could do so for ever
    if full then return end
    budget = budget - t[6]
  end
  t[9], t[10] = t[9] + 1, consumer
  local raw = cmsgpack.pack(t)
  put(m, 'tickets', tkey, raw)
  unpend(tkey, t)
  call('ZADD', K('leased'), now + lease_ms, tkey)
  local hint = hinted(t)
  out[#out + 1] = { tkey, raw, hint }
  names[#names + 1] = { tkey, t[9], hint }
end

reap(m, now, REPAIR)
for _, tkey in ipairs(call('ZRANGEBYSCORE', K('pend:e'), '-inf', m.version, 'LIMIT', 0, want)) do take(tkey) end
local last_score, page = '(' .. (m.version + bound + 1) * STEP, 0
while #out < want and not full do -- pages, for tickets that wait for a later version are passed over
  local keys = call('ZRANGEBYSCORE', K('pend:t'), '-inf', last_score, 'LIMIT', page, want)
  if #keys == 0 then break end
  local before = call('ZCARD', K('pend:t'))
  for _, tkey in ipairs(keys) do
    if #out < want then take(tkey) end
  end
  page = page + #keys - (before - call('ZCARD', K('pend:t')))
end
call('HSET', K('lastlease'), consumer, cmsgpack.pack({ nonce, unpack(names) }))
return out
