-- Shared by every script (prepended by scripting.py). KEYS[1] is the run's prefix, "avatar:{run}:".
-- A tier is a score range: `rank` orders prompts by Rbar, `stock:f` and `stock:s` hold the replayable failures and
-- successes scored by their prompt's Rbar. Nothing moves when only the thresholds do (docs/method.md 1.3).
local P = KEYS[1]
local STEP = 100000000 -- a sequence number is below this, so step * STEP + seq orders tickets and stays under 2^53
local FIXED = 268435456 -- Rbar is a multiple of 2^-28
local REPAIR = 512 -- evictions at once, within Lua's stack; a call may add this many to what it has to make room for
local SCAN = 128 -- fewest entries looked at at once in an age bin that a threshold cuts
local LINGER_MS, SNAPSHOT_LINGER_MS = 10000, 3600000 -- a deleted value stays readable for who has just drawn it

local function K(name) return P .. name end
local call, floor = redis.call, math.floor
local function fail(kind, text) error('AVATAR_' .. kind .. ' ' .. text, 0) end
local function tid_of(gid, i) return gid .. '.' .. string.format('%d', i) end

-- The run's state and, in `packed`, the settings of the run, packed.
local function meta()
  local raw = call('HMGET', K('meta'), 'version', 'trained', 'epoch', 'snap', 'kl', 'packed')
  if not raw[1] then fail('NORUN', 'no run under ' .. P) end
  local m = cmsgpack.unpack(raw[6])
  m.version, m.trained, m.epoch = tonumber(raw[1]), tonumber(raw[2]), tonumber(raw[3])
  m.snap, m.kl = tonumber(raw[4]), tonumber(raw[5])
  return m
end

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + floor(t[2] / 1000)
end

-- Writes to the five snapshotted hashes: while a snapshot is being read, the first writer of a field keeps the old value.
local function keep(m, hash, field)
  if m.snap > 0 then call('HSETNX', K('snap:' .. hash), field, call('HGET', K(hash), field) or '') end
end
local function put(m, hash, field, value)
  keep(m, hash, field)
  call('HSET', K(hash), field, value)
end
local function del(m, hash, field)
  keep(m, hash, field)
  call('HDEL', K(hash), field)
end

-- Calls command(key, ...) with a long argument list in pieces that fit Lua's stack.
local function many(command, key, args)
  for first = 1, #args, 1000 do call(command, key, unpack(args, first, math.min(first + 999, #args))) end
end

local function count(name, n) call('HINCRBY', K('ledger'), name, n) end

-- Prompt statistics: {Rbar, hinted Rbar, visits, hinted visits, hard streak, zero streak, hint on, on since seq}.
-- A visit is {seq, reward, ...}; visits are kept in seq order, so the order of arrival does not matter.
local function load_prompt(pid)
  local raw = call('HGET', K('prompts'), pid)
  if raw then return cmsgpack.unpack(raw) end
  return { false, false, {}, {}, 0, 0, 0, 0 }
end

local function mean_of_last(visits, window, since)
  local n, total, used = 0, 0, 0
  for _, visit in ipairs(visits) do
    if visit[1] >= since then n = n + #visit - 1 end
  end
  local skip = n - window
  for _, visit in ipairs(visits) do
    if visit[1] >= since then
      for i = 2, #visit do
        if skip > 0 then skip = skip - 1 else total = total + visit[i]; used = used + 1 end
      end
    end
  end
  -- Rounded, so that equal rewards tie whatever their number (docs/method.md 1.3), and sums over prompts are exact in any order.
  return used > 0 and floor(total / used * FIXED + 0.5) / FIXED or false
end

local function add_visit(visits, seq, rewards, window)
  local at, n = #visits + 1, #rewards
  while at > 1 and visits[at - 1][1] > seq do at = at - 1 end
  local visit = { seq }
  for i, reward in ipairs(rewards) do visit[i + 1] = reward end
  table.insert(visits, at, visit)
  n = 0
  for _, v in ipairs(visits) do n = n + #v - 1 end
  while n - (#visits[1] - 1) >= window do
    n = n - (#visits[1] - 1)
    table.remove(visits, 1)
  end
end

local function score_of(state) return state[1] or state[2] end
local function fixed(r) return floor(r * FIXED + 0.5) end

-- Lower order statistics of all prompts seen: {low, high} as numbers; nil before the first prompt.
local function thresholds(m)
  local n = call('ZCARD', K('rank'))
  if n == 0 then return nil end
  local function at(q)
    local i = floor(q * (n - 1))
    return tonumber(call('ZRANGE', K('rank'), i, i, 'WITHSCORES')[2])
  end
  return { at(m.q_low), at(m.q_high) }
end

local function tier_of(q, rbar)
  if rbar <= q[1] then return 1 end
  return rbar <= q[2] and 2 or 3
end

-- seg[tier][kind] = {first rank in stock:kind, members}; tiers 1 Hard, 2 Medium, 3 Easy.
local function segments(q)
  local seg = { {}, {}, {} }
  for _, kind in ipairs({ 'f', 's' }) do
    local low = q and call('ZCOUNT', K('stock:' .. kind), '-inf', q[1]) or 0
    local high = q and call('ZCOUNT', K('stock:' .. kind), '-inf', q[2]) or 0
    local all = call('ZCARD', K('stock:' .. kind))
    seg[1][kind], seg[2][kind], seg[3][kind] = { 0, low }, { low, high - low }, { high, all - high }
  end
  return seg
end

local function bin_of(rbar) return math.max(-64, math.min(64, floor(rbar * 16))) end
local function age_key(kind, bin) return K('age:' .. kind .. ':' .. string.format('%d', bin)) end

-- A stocked trajectory's record: {pid, success 0|1, version}.
local function stock_add(tid, record, rbar)
  local kind = record[2] == 1 and 's' or 'f'
  call('ZADD', K('stock:' .. kind), rbar, tid)
  call('ZADD', K('stock:v'), record[3], tid)
  call('ZADD', K('pt:' .. record[1]), record[2], tid)
  call('ZADD', age_key(kind, bin_of(rbar)), 0, tid)
end

local function forget_value(m, tid)
  call('PEXPIRE', K('t:' .. tid), m.snap > 0 and SNAPSHOT_LINGER_MS or LINGER_MS)
end

local function stock_remove(m, tid)
  local record = cmsgpack.unpack(call('HGET', K('trajs'), tid))
  local kind = record[2] == 1 and 's' or 'f'
  local rbar = tonumber(call('ZSCORE', K('stock:' .. kind), tid))
  call('ZREM', K('stock:' .. kind), tid)
  call('ZREM', K('stock:v'), tid)
  call('ZREM', K('pt:' .. record[1]), tid)
  call('ZREM', age_key(kind, bin_of(rbar)), tid)
  del(m, 'trajs', tid)
  del(m, 'reuse', tid)
  forget_value(m, tid)
end

-- A prompt's stored trajectories follow its Rbar.
local function rescore(pid, old, new)
  if old == new or not old then return end
  local members = call('ZRANGE', K('pt:' .. pid), 0, -1, 'WITHSCORES')
  if #members == 0 then return end
  local moved = bin_of(old) ~= bin_of(new)
  for _, kind in ipairs({ 'f', 's' }) do
    local scored, names, aged = {}, {}, {}
    for i = 1, #members, 2 do
      if (members[i + 1] == '1') == (kind == 's') then
        scored[#scored + 1], scored[#scored + 2] = new, members[i]
        names[#names + 1] = members[i]
        aged[#aged + 1], aged[#aged + 2] = 0, members[i]
      end
    end
    many('ZADD', K('stock:' .. kind), scored)
    if moved then
      many('ZREM', age_key(kind, bin_of(old)), names)
      many('ZADD', age_key(kind, bin_of(new)), aged)
    end
  end
end

-- The `need` oldest members of one kind in the score range (low, high]; oldest = lowest seq.
local function oldest(kind, low, high, need)
  local key, found = K('stock:' .. kind), {}
  local from, to = low and '(' .. string.format('%.17g', low) or '-inf', high or '+inf'
  local least = call('ZRANGEBYSCORE', key, from, to, 'WITHSCORES', 'LIMIT', 0, 1)
  if #least == 0 then return found end
  local most = call('ZREVRANGEBYSCORE', key, to, from, 'WITHSCORES', 'LIMIT', 0, 1)
  for bin = bin_of(tonumber(least[2])), bin_of(tonumber(most[2])) do
    local cut = (low and bin == bin_of(low)) or (high and bin == bin_of(high)) or bin == 64 or bin == -64
    local page, first, before = cut and math.max(need, SCAN) or need, 0, #found
    repeat -- pages, for the oldest of a cut bin may all be of another tier
      local members = call('ZRANGE', age_key(kind, bin), first, first + page - 1)
      if cut and #members > 0 then
        local scores = call('ZMSCORE', key, unpack(members))
        for i, tid in ipairs(members) do
          local s = tonumber(scores[i])
          if (not low or s > low) and (not high or s <= high) then found[#found + 1] = tid end
        end
      else
        for _, tid in ipairs(members) do found[#found + 1] = tid end
      end
      first = first + page
    until #found - before >= need or #members < page
  end
  table.sort(found, function(a, b)
    local x, y = tonumber(string.sub(a, 1, 8)), tonumber(string.sub(b, 1, 8))
    if x ~= y then return x < y end
    return string.sub(a, 10) < string.sub(b, 10)
  end)
  for i = #found, need + 1, -1 do found[i] = nil end
  return found
end

-- Brings every tier under its capacity, at most REPAIR removals more in each than the call has `added` to the stock, so
-- that it never grows beyond and a lowered capacity holds nobody up. Returns how many went.
local function evict(m, q, added)
  local seg, gone = segments(q), 0
  local caps = { m.cap_hard, m.cap_medium, m.cap_easy }
  for tier = 1, 3 do
    local low, high = tier > 1 and q[tier - 1] or nil, tier < 3 and q[tier] or nil
    local need = math.min(seg[tier].f[2] + seg[tier].s[2] - caps[tier], REPAIR + added)
    for _, kind in ipairs({ 'f', 's' }) do
      local left = math.min(need, seg[tier][kind][2])
      need = need - left
      while left > 0 do
        local victims = oldest(kind, low, high, math.min(left, REPAIR))
        for _, tid in ipairs(victims) do stock_remove(m, tid) end
        left, gone = #victims > 0 and left - #victims or 0, gone + #victims
      end
    end
  end
  if gone > 0 then count('evicted', gone) end
  return gone
end

local function expire_old(m, added)
  if m.max_age == 0 then return 0 end
  local limit = REPAIR + added
  local old = call('ZRANGEBYSCORE', K('stock:v'), '-inf', '(' .. (m.version - m.max_age), 'LIMIT', 0, limit)
  for _, tid in ipairs(old) do stock_remove(m, tid) end
  if #old > 0 then count('aged_out', #old) end
  return #old
end

-- Folds one visit into a prompt's statistics and moves its stock with it.
local function fold_visit(m, pid, seq, rewards, hinted)
  local state = load_prompt(pid)
  local before = score_of(state)
  local which = hinted and 4 or 3
  add_visit(state[which], seq, rewards, m.window)
  state[which - 2] = mean_of_last(state[which], m.window, 0)
  local after = score_of(state)
  put(m, 'prompts', pid, cmsgpack.pack(state))
  if before ~= after then
    call('ZADD', K('rank'), after, pid)
    call('HINCRBY', K('meta'), 'rbar_sum', fixed(after) - (before and fixed(before) or 0))
    rescore(pid, before, after)
  end
end

-- Hint gate after a finished visit (docs/method.md 1.4): streaks while off, release when the prompt leaves Hard. `zero`: 1 when
-- every accuracy was 0, 0 when one was not, -1 when unknown (masked).
local function gate_visit(m, q, pid, hinted, zero)
  local state = load_prompt(pid)
  local hard = tier_of(q, score_of(state)) == 1
  if state[7] == 1 then
    local helped = mean_of_last(state[4], m.window, state[8])
    if not hard or (hinted and helped and helped > q[1]) then
      state[5], state[6], state[7] = 0, 0, 0
      call('SREM', K('hints'), pid)
      count('hints_released', 1)
    end
  elseif not hinted then
    state[5] = hard and state[5] + 1 or 0
    if zero >= 0 then state[6] = zero == 1 and state[6] + 1 or 0 end
  end
  put(m, 'prompts', pid, cmsgpack.pack(state))
end

-- One group {pid, step, hinted, n, zero, successes, versions} leaves `fresh`, or arrives late, and becomes replayable.
local function make_replayable(m, q, gid, group)
  local rbar = tonumber(call('ZSCORE', K('rank'), group[1]))
  for i = 1, group[4] do
    local tid, record = tid_of(gid, i - 1), { group[1], group[6][i], group[7][i] }
    put(m, 'trajs', tid, cmsgpack.pack(record))
    stock_add(tid, record, rbar)
  end
  gate_visit(m, q, group[1], group[3], group[5])
end

-- Tickets: {pid, step, epoch, kind, round, n, min_version, seq, attempt, consumer}; leased while in `leased`.
local function pend(tkey, t)
  if t[4] == 'eval' then call('ZADD', K('pend:e'), t[7], tkey)
  else call('ZADD', K('pend:t'), t[2] * STEP + t[8], tkey) end
end
local function unpend(tkey, t) call('ZREM', K(t[4] == 'eval' and 'pend:e' or 'pend:t'), tkey) end

local function drop_ticket(m, tkey, t)
  if call('ZREM', K('leased'), tkey) == 0 then unpend(tkey, t) end
  del(m, 'tickets', tkey)
end

-- Expired leases go back to the queue, lowest seq first by the queue's order; a ticket whose step has passed goes away.
local function reap(m, now, limit)
  local keys = call('ZRANGEBYSCORE', K('leased'), '-inf', now, 'LIMIT', 0, limit)
  for _, tkey in ipairs(keys) do
    local t = cmsgpack.unpack(call('HGET', K('tickets'), tkey))
    call('ZREM', K('leased'), tkey)
    if t[4] == 'train' and t[2] <= m.trained then del(m, 'tickets', tkey) else pend(tkey, t) end
  end
  if #keys > 0 then count('leases_expired', #keys) end
  return #keys
end

-- Combined multiplicative generator of L'Ecuyer (1988): every product stays below 2^53, so Python repeats it exactly.
local function generator(x, y)
  return function(n) -- uniform integer in [0, n)
    x, y = (x * 40014) % 2147483563, (y * 40692) % 2147483399
    local z = (x - y) % 2147483562 * n / 2147483562
    return z - z % 1 -- its floor, without a call
  end
end
