-- requires: snapshot
-- Prompt statistics. A visit is {seq, reward, ...}; visits are kept in seq order, so the order of arrival does not
-- matter. `marks` has a text for each visit, a letter for each reward: accuracy 0, 1 or anything else ('?'); it is
-- shorter where an older release stored the visit. `rank` orders prompts by Rbar.
local FIXED = 268435456 -- Rbar is a multiple of 2^-28

-- Of the packed values; without any, of a new prompt.
local function prompt_of(v)
  return {
    rbar = v[1] or false, hinted_rbar = v[2] or false, visits = v[3] or {}, hinted_visits = v[4] or {},
    hard_streak = v[5] or 0, zero_streak = v[6] or 0, hint_on = v[7] or 0, hint_since = v[8] or 0,
    marks = v[9] or {}, hinted_marks = v[10] or {}, throughout = v[11] or false, hint_rbar = v[12] or false,
    kls = v[13] or {}, -- from `marks` on, not in snapshots of older releases
  }
end

local function unpack_prompt(raw) return prompt_of(cmsgpack.unpack(raw)) end

local function load_prompt(pid)
  local raw = call('HGET', K('prompts'), pid)
  return prompt_of(raw and cmsgpack.unpack(raw) or {})
end

local function store_prompt(m, pid, s)
  put(m, 'prompts', pid, cmsgpack.pack({
    s.rbar, s.hinted_rbar, s.visits, s.hinted_visits, s.hard_streak, s.zero_streak, s.hint_on, s.hint_since,
    s.marks, s.hinted_marks, s.throughout, s.hint_rbar, s.kls,
  }))
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
