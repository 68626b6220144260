-- requires: prompts
-- The hint gate (docs/method.md 1.4); `hints` has the prompts whose hint is on.

-- The prompt's own KL to the behaviour policy: mean over its last visits of {sum of k3, tokens}. False without any.
local function own_kl(m, s)
  local first, total = math.max(1, #s.kls - m.hard_patience + 1), 0
  for i = first, #s.kls do total = total + s.kls[i][1] / s.kls[i][2] end
  return #s.kls > 0 and total / (#s.kls - first + 1)
end

-- Whether a request goes out with its hint, 0|1. It comes on when the prompt stays Hard and the policy has stopped
-- exploring it, or stays at zero.
local function hint_for(m, r)
  if r.kind == 'eval' or m.hints == 0 then return 0 end
  local raw = call('HGET', K('prompts'), r.prompt)
  if not raw then return 0 end
  local s = unpack_prompt(raw)
  if s.hint_on == 1 then return 1 end
  local kl = s.hard_streak >= m.hard_patience and own_kl(m, s)
  local still = kl and kl < m.kl_below
  if not still and s.zero_streak < m.zero_patience then return 0 end
  s.hint_on, s.hint_since, s.hint_rbar = 1, r.seq, score_of(s)
  store_prompt(m, r.prompt, s)
  call('SADD', K('hints'), r.prompt)
  count('hints_fired', 1)
  count(still and 'hints_fired_kl' or 'hints_fired_patience', 1)
  return 1
end

-- After the visit of a group: streaks while off, release when the prompt leaves Hard by doing better than when the hint
-- came on: a change of rank alone is none. `g.zero`: 1 when every accuracy was 0, 0 when one was not, -1 when unknown
-- (masked).
local function gate_visit(m, q, s, g)
  local function left(rbar, throughout)
    return rbar and place(rbar, throughout) > q.low and (not s.hint_rbar or rbar > s.hint_rbar)
  end
  if s.hint_on == 1 then
    local helped, throughout = mean_of_last(s.hinted_visits, s.hinted_marks, m.window, s.hint_since)
    if left(score_of(s), s.throughout) or (g.hinted and left(helped, throughout)) then
      s.hard_streak, s.zero_streak, s.hint_on = 0, 0, 0
      call('SREM', K('hints'), g.prompt)
      count('hints_released', 1)
    end
  elseif not g.hinted then
    s.hard_streak = place_of(s) <= q.low and s.hard_streak + 1 or 0
    if g.zero >= 0 then s.zero_streak = g.zero == 1 and s.zero_streak + 1 or 0 end
  end
  store_prompt(m, g.prompt, s)
end
