-- requires: prompts
-- The hint gate (docs/method.md 1.4); `hints` has the prompts whose hint is on.

-- Whether a request goes out with its hint, 0|1. It comes on when the prompt stays Hard and the policy has stopped
-- exploring, or stays at zero.
local function hint_for(m, r)
  if r.kind == 'eval' or m.hints == 0 then return 0 end
  local raw = call('HGET', K('prompts'), r.prompt)
  if not raw then return 0 end
  local s = unpack_prompt(raw)
  local still = m.kl and m.kl < m.kl_below and s.hard_streak >= m.hard_patience
  if s.hint_on == 0 and (still or s.zero_streak >= m.zero_patience) then
    s.hint_on, s.hint_since = 1, r.seq
    store_prompt(m, r.prompt, s)
    call('SADD', K('hints'), r.prompt)
    count('hints_fired', 1)
  end
  return s.hint_on
end

-- After the visit of a group: streaks while off, release when the prompt leaves Hard. `g.zero`: 1 when every accuracy
-- was 0, 0 when one was not, -1 when unknown (masked).
local function gate_visit(m, q, g)
  local s = load_prompt(g.prompt)
  local hard = score_of(s) <= q.low
  if s.hint_on == 1 then
    local helped = mean_of_last(s.hinted_visits, m.window, s.hint_since)
    if not hard or (g.hinted and helped and helped > q.low) then
      s.hard_streak, s.zero_streak, s.hint_on = 0, 0, 0
      call('SREM', K('hints'), g.prompt)
      count('hints_released', 1)
    end
  elseif not g.hinted then
    s.hard_streak = hard and s.hard_streak + 1 or 0
    if g.zero >= 0 then s.zero_streak = g.zero == 1 and s.zero_streak + 1 or 0 end
  end
  store_prompt(m, g.prompt, s)
end
