-- requires: snapshot
-- Prompt statistics. A visit is {seq, reward, ...}; visits are kept in seq order, so the order of arrival does not
-- matter. `rank` orders prompts by Rbar.
local FIXED = 268435456 -- Rbar is a multiple of 2^-28

local function unpack_prompt(raw)
  local s = {}
  s.rbar, s.hinted_rbar, s.visits, s.hinted_visits, s.hard_streak, s.zero_streak, s.hint_on, s.hint_since =
    unpack(cmsgpack.unpack(raw))
  return s
end

local function load_prompt(pid)
  local raw = call('HGET', K('prompts'), pid)
  if raw then return unpack_prompt(raw) end
  return {
    rbar = false, hinted_rbar = false, visits = {}, hinted_visits = {},
    hard_streak = 0, zero_streak = 0, hint_on = 0, hint_since = 0,
  }
end

local function store_prompt(m, pid, s)
  put(m, 'prompts', pid, cmsgpack.pack({
    s.rbar, s.hinted_rbar, s.visits, s.hinted_visits, s.hard_streak, s.zero_streak, s.hint_on, s.hint_since,
  }))
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
  -- Rounded, so that equal rewards tie whatever their number (docs/method.md 1.3), and sums over prompts are exact in
  -- any order.
  return used > 0 and floor(total / used * FIXED + 0.5) / FIXED or false
end

local function score_of(s) return s.rbar or s.hinted_rbar end
