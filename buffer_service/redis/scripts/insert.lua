-- requires: requests prompts stock
-- ARGV[1]: the packed head (NewGroup of requests.py). ARGV[2]: the packed state, kept as it is while the group is fresh
-- (GroupState). ARGV[3..]: the encoded trajectories. An imported group comes from a file, for replay only, without a
-- request. Returns {status, evicted}. Every check comes before the first write.
local m = meta()
local gid, seq, step, pid, hinted, tokens, rkey, bound, imported, rewards, marks, counted, replace =
  unpack(cmsgpack.unpack(ARGV[1]))
if call('GETBIT', K('seen'), seq) == 1 then
  count('duplicates', 1)
  return { 'duplicate', 0 }
end
local r = load_request(rkey)
if imported and r then fail('TAKEN', 'group ' .. gid .. ' is what a request of this run waits for') end
if not r and not imported and step > m.trained then
  fail('UNKNOWN', 'group ' .. gid .. ' has no request in this run')
end
if r and (r.prompt ~= pid or r.step ~= step) then
  fail('UNKNOWN', 'group ' .. gid .. ' is of prompt ' .. pid .. ' and step ' .. step .. ', its request asks for ' ..
    r.prompt .. ' and step ' .. r.step)
end

-- The rewards that rest on no imputed mark, and their accuracies (docs/method.md 1.5). A prompt that has no statistic yet
-- takes what there is: its stock needs a place.
local function of_statistics(known)
  if not counted:find('1', 1, true) and not known then return rewards, marks end
  local values, kept = {}, ''
  for i = 1, #rewards do
    if counted:sub(i, i) == '1' then
      values[#values + 1] = rewards[i]
      kept = kept .. marks:sub(i, i)
    end
  end
  return values, kept
end

local function add_visit(visits, marked, rewards, marks)
  local at, n = #visits + 1, 0
  for i = 1, #visits do marked[i] = marked[i] or '' end -- of an older release
  while at > 1 and visits[at - 1][1] > seq do at = at - 1 end
  table.insert(visits, at, { seq, unpack(rewards) })
  table.insert(marked, at, marks)
  for _, visit in ipairs(visits) do n = n + #visit - 1 end
  while n - (#visits[1] - 1) >= m.window do
    n = n - (#visits[1] - 1)
    table.remove(visits, 1)
    table.remove(marked, 1)
  end
end

-- The prompt's stored trajectories follow its place.
local function rescore(old, new)
  local members = call('ZRANGE', K('pt:' .. pid), 0, -1, 'WITHSCORES')
  if #members == 0 then return end
  local moved, score = bin_of(old) ~= bin_of(new), string.format('%.17g', new) -- once: numbers are slow to write out
  for _, kind in ipairs(KINDS) do
    local scored, names, aged = {}, {}, {}
    for i = 1, #members, 2 do
      if (members[i + 1] == '1') == (kind == 's') then
        scored[#scored + 1], scored[#scored + 2] = score, members[i]
        names[#names + 1] = members[i]
        aged[#aged + 1], aged[#aged + 2] = '0', members[i]
      end
    end
    many('ZADD', K('stock:' .. kind), scored)
    if moved then
      many('ZREM', age_key(kind, bin_of(old)), names)
      many('ZADD', age_key(kind, bin_of(new)), aged)
    end
  end
end

local function fixed(rbar) return floor(rbar * FIXED + 0.5) end

-- Folds the visit into the prompt's statistics and moves its stock with it.
local function fold_visit()
  local s = load_prompt(pid)
  local before, stood = score_of(s), place_of(s)
  local visits, marked = s.visits, s.marks
  if hinted then visits, marked = s.hinted_visits, s.hinted_marks end
  local values, kept = of_statistics(before)
  if #values == 0 then return end
  add_visit(visits, marked, values, kept)
  local mean, throughout = mean_of_last(visits, marked, m.window, 0)
  if hinted then s.hinted_rbar = mean else s.rbar = mean end
  if not (hinted and s.rbar) then s.throughout = throughout end
  local after, stands = score_of(s), place_of(s)
  store_prompt(m, pid, s)
  if before ~= after then
    call('ZADD', K('rank'), after, pid)
    call('HINCRBY', K('meta'), 'rbar_sum', fixed(after) - (before and fixed(before) or 0))
  end
  if before and stood ~= stands then rescore(stood, stands) end
end

local late = imported or step <= m.trained or (bound ~= UNCHECKED and step + bound < m.version)
local values, n, start = {}, #rewards, K('t:' .. gid .. '.')
for i = 1, n do values[2 * i - 1], values[2 * i] = start .. i - 1, ARGV[i + 2] end
call('MSET', unpack(values)) -- first, so that a full Redis refuses before anything else is written
call('SETBIT', K('seen'), seq, 1)
if r then drop_request(m, rkey, r) end -- a passed step's request may be gone; its group still serves replay
fold_visit()
count('generated', 1)
count('completions', n)
count('tokens', tokens)
if not late then
  put(m, 'groups', gid, ARGV[2])
  call('ZADD', K('fresh'), step * STEP + seq, gid)
  if replace and r and #r.spares > 0 then ask_spare(m, r) end
  return { 'fresh', 0 }
end

-- What follows is for late groups alone: their parts cost the others nothing.
-- requires: replayable
local q = thresholds(m)
make_replayable(m, q, gid, group(ARGV[2]))
count('replay_only', 1)
if imported then count('imported', 1) elseif step > m.trained then call('HINCRBY', K('steps'), step, -1) end
return { 'late', evict(m, q, n) }
