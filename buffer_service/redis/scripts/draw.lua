-- requires: tiers stock random
-- ARGV: count, step, seed x, seed y, strategy, reward diverse 0|1, version, seed name, rank, world, list them 0|1,
-- prompt ids... (strategies priority and magnitude: temperature, half-life). Returns the tids, separated by spaces, and leaves them in a list if asked: a SORT behind this call then
-- reads the values in the same round trip (through Lua they would take longer). One that is removed meanwhile lingers.
-- Choices are by rank in sorted sets whose order depends on contents only: equal contents and seed give equal draws.
local m = meta()
local want, step, strategy, diverse = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[5], ARGV[6] == '1'
if step <= m.trained then fail('TRAINED', 'step ' .. ARGV[2] .. ' is already trained: its draw is over') end
m.version = math.max(m.version, tonumber(ARGV[7]))
local stored = call('ZCARD', K('stock:v'))
if stored < m.warm_up then return '' end
stored = stored - expire_old(m, 0)
if stored == 0 then return '' end
local below = generator(tonumber(ARGV[3]), tonumber(ARGV[4]))
local q, taken, out = thresholds(m), {}, {}
local seg = segments(q)
if tonumber(call('HGET', K('meta'), 'drawn_step')) ~= step then
  call('DEL', K('drawn'))
  untally('drawn')
  call('HSET', K('meta'), 'drawn_step', step)
end

local elsewhere = {} -- what other draws of this step hold: with a reuse limit a trajectory serves one draw per step
if m.max_reuse > 0 then
  local marks = call('HGETALL', K('drawn'))
  for i = 1, #marks, 2 do
    if marks[i] ~= ARGV[8] then
      for _, tid in ipairs(cmsgpack.unpack(marks[i + 1])) do elsewhere[tid] = true end
    end
  end
end

-- Takes up to n untaken members of the ranges {key, first, size}, uniformly: a Fisher-Yates shuffle of positions
-- that remembers only the swapped ones.
local function pick(ranges, n)
  if n == 0 then return 0 end
  local size, swapped, got, i, last = 0, {}, 0, 0, #ranges
  for at = 1, last do size = size + ranges[at].size end
  while got < n and i < size do
    local j = i + below(size - i)
    local position = swapped[j] or j
    swapped[j] = swapped[i] or i
    i = i + 1
    local at, r = 1, ranges[1]
    while at < last and position >= r.size do
      position, at = position - r.size, at + 1
      r = ranges[at]
    end
    local rank = r.first + position -- below 10^8, which every Redis writes out as an integer
    local tid = call('ZRANGE', r.key, rank, rank)[1]
    if not (taken[tid] or elsewhere[tid]) then
      taken[tid], got = true, got + 1
      out[#out + 1] = tid
    end
  end
  return got
end

local function of_tier(tier, kind)
  local segment = seg[tier][kind]
  return { key = K('stock:' .. kind), first = segment.first, size = segment.size }
end
local function all(kind)
  local size = seg[HARD][kind].size + seg[MEDIUM][kind].size + seg[EASY][kind].size
  return { key = K('stock:' .. kind), first = 0, size = size }
end

-- n members of failures and successes; diverse: half of each, the odd one from `first`, then whichever is left.
local function mix(failures, successes, n, first)
  if not diverse then return pick({ failures, successes }, n) end
  local more, less = math.ceil(n / 2), floor(n / 2)
  local got = pick({ successes }, first == 's' and more or less) + pick({ failures }, first == 's' and less or more)
  return got + pick({ failures, successes }, n - got)
end

local function round(x) return floor(x + 0.5) end
local function quotas(n) -- docs/method.md 1.3: 1 Easy, 1 Medium, 2 Hard of 4
  local function of(k)
    local easy, medium = round(k * m.block_easy), round(k * m.block_medium)
    medium = math.min(medium, k - easy)
    return easy, medium, k - easy - medium
  end
  local blocks, rest = floor(n / m.block), n % m.block
  local e, d, h = of(m.block)
  local re, rd, rh = of(rest)
  return blocks * e + re, blocks * d + rd, blocks * h + rh
end

local function stratified(n)
  local easy, medium, hard = quotas(n)
  mix(of_tier(EASY, 'f'), of_tier(EASY, 's'), easy, 'f') -- the odd one is of the rarer kind
  mix(of_tier(MEDIUM, 'f'), of_tier(MEDIUM, 's'), medium, 's')
  mix(of_tier(HARD, 'f'), of_tier(HARD, 's'), hard, 's')
end

-- n of some ranges with replacement, by the advantage that was stored: exp(advantage / temperature), the draw of
-- AVATAR's released code; `magnitude`: |advantage| and a little for those without. A weight halves with every half-life
-- of versions that a trajectory is older than the newest of them. O(ranges).
local function by_advantage(ranges, n, magnitude)
  local names, values, versions, most, newest = {}, {}, {}, -math.huge, 0
  for _, r in ipairs(ranges) do
    if r.size > 0 then
      for _, tid in ipairs(call('ZRANGE', r.key, r.first, r.first + r.size - 1)) do names[#names + 1] = tid end
    end
  end
  n = math.min(n, #names)
  if n == 0 then return end
  for first = 1, #names, 1000 do
    local raws = call('HMGET', K('trajs'), unpack(names, first, math.min(first + 999, #names)))
    for i, raw in ipairs(raws) do
      local known = cmsgpack.unpack(raw)
      local value = known[4] or 0 -- none in a stock of an older release
      values[first + i - 1], versions[first + i - 1] = value, known[3]
      most, newest = math.max(most, value), math.max(newest, known[3])
    end
  end
  local temperature, half_life, sums, total = tonumber(ARGV[12]), tonumber(ARGV[13]), {}, 0
  for i, value in ipairs(values) do
    local weight = magnitude and math.abs(value) + 0.05 or math.exp((value - most) / temperature)
    if half_life > 0 then weight = weight * 0.5 ^ ((newest - versions[i]) / half_life) end
    total = total + weight
    sums[i] = total
  end
  for _ = 1, n do
    local at = (below(1048576) * 1048576 + below(1048576)) / 1099511627776 * total
    local low, high = 1, #sums -- the first sum above `at`
    while low < high do
      local middle = floor((low + high) / 2)
      if sums[middle] > at then high = middle else low = middle + 1 end
    end
    out[#out + 1] = names[low]
  end
end

if strategy == 'recent' then
  out = call('ZREVRANGE', K('stock:v'), 0, want - 1)
elseif strategy == 'uniform' then
  mix(all('f'), all('s'), want, 's')
elseif strategy == 'magnitude' then
  by_advantage({ all('f'), all('s') }, want, true)
elseif strategy == 'priority' then
  local easy, medium, hard = quotas(want)
  by_advantage({ of_tier(EASY, 'f'), of_tier(EASY, 's') }, easy)
  by_advantage({ of_tier(MEDIUM, 'f'), of_tier(MEDIUM, 's') }, medium)
  by_advantage({ of_tier(HARD, 'f'), of_tier(HARD, 's') }, hard)
  if #out < want then pick({ all('f'), all('s') }, want - #out) end
else
  if strategy == 'same_prompt' then
    local prompts = #ARGV - 11
    for i = 1, prompts do
      local key = K('pt:' .. ARGV[11 + i])
      local failures = call('ZCOUNT', key, 0, 0)
      local n = floor(want / prompts) + (i <= want % prompts and 1 or 0)
      local successes = call('ZCARD', key) - failures
      mix({ key = key, first = 0, size = failures }, { key = key, first = failures, size = successes }, n, 's')
    end
  end
  if #out < want then stratified(want - #out) end
  if #out < want then pick({ all('f'), all('s') }, want - #out) end
end

if m.max_reuse == 0 then
  local unique = #out
  while #out < want and unique > 0 do out[#out + 1] = out[1 + below(unique)] end -- short stock: repeats
end
for i = #out, 2, -1 do
  local j = 1 + below(i)
  out[i], out[j] = out[j], out[i]
end
if #out == 0 then return '' end
tally('drawn', call('HSET', K('drawn'), ARGV[8], cmsgpack.pack(out)))

local rank, world, names = tonumber(ARGV[9]), tonumber(ARGV[10]), out
if world > 1 then
  names = {}
  for i = 1 + rank, #out, world do names[#names + 1] = out[i] end
end
if ARGV[11] == '1' then
  local list = K('share:' .. ARGV[8] .. ':' .. ARGV[9])
  call('DEL', list)
  many('RPUSH', list, names)
  call('PEXPIRE', list, LINGER_MS)
end
return table.concat(names, ' ')
