-- requires: snapshot
-- Prompt statistics. A visit is {seq, reward, ...}; visits are kept in seq order, so the order of arrival does not
-- matter. `marks` has a text for each visit, a letter for each reward: accuracy 0, 1 or anything else ('?'); it is
-- shorter where an older release stored the visit. `rank` orders prompts by Rbar.
local FIXED = 268435456 -- Rbar is a multiple of 2^-28
local FIELDS = {
  'rbar', 'hinted_rbar', 'visits', 'hinted_visits', 'hard_streak', 'zero_streak', 'hint_on', 'hint_since',
  'marks', 'hinted_marks', 'throughout', 'hint_rbar', 'kls', -- not in snapshots of older releases
}

local function new_prompt()
  return {
    rbar = false, hinted_rbar = false, visits = {}, hinted_visits = {},
    hard_streak = 0, zero_streak = 0, hint_on = 0, hint_since = 0,
    marks = {}, hinted_marks = {}, throughout = false, hint_rbar = false, kls = {},
  }
end

local function unpack_prompt(raw)
  local s, values = new_prompt(), cmsgpack.unpack(raw)
  for i, name in ipairs(FIELDS) do
    if values[i] ~= nil then s[name] = values[i] end
  end
  return s
end

local function load_prompt(pid)
  local raw = call('HGET', K('prompts'), pid)
  return raw and unpack_prompt(raw) or new_prompt()
end

local function store_prompt(m, pid, s)
  local values = {}
  for i, name in ipairs(FIELDS) do values[i] = s[name] end
  put(m, 'prompts', pid, cmsgpack.pack(values))
end

-- Mean of the last rewards, false without any; and '0' or '1' where the accuracy of each of them was that, else false.
local function mean_of_last(visits, marks, window, since)
  local n, total, used, zeros, ones = 0, 0, 0, 0, 0
  for _, visit in ipairs(visits) do
    if visit[1] >= since then n = n + #visit - 1 end
  end
  local skip = n - window
  for k, visit in ipairs(visits) do
    if visit[1] >= since then
      for i = 2, #visit do
        if skip > 0 then
          skip = skip - 1
        else
          total, used = total + visit[i], used + 1
          local mark = string.sub(marks[k] or '', i - 1, i - 1)
          if mark == '0' then zeros = zeros + 1 elseif mark == '1' then ones = ones + 1 end
        end
      end
    end
  end
  if used == 0 then return false, false end
  -- Rounded, so that equal rewards tie whatever their number (docs/method.md 1.3), and sums over prompts are exact in
  -- any order.
  return floor(total / used * FIXED + 0.5) / FIXED, zeros == used and '0' or ones == used and '1' or false
end

local function score_of(s) return s.rbar or s.hinted_rbar end

-- Where a prompt stands against the thresholds: at its Rbar, or beyond all of them where it was never solved or always.
local function place(rbar, throughout)
  if throughout == '0' then return -math.huge end
  return throughout == '1' and math.huge or rbar
end
local function place_of(s) return place(score_of(s), s.throughout) end
