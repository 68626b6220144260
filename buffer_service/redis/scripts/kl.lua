-- requires: prompts
-- ARGV: step, packed {prompt, sum of k3, tokens, fresh} each (PromptKl of requests.py). A fresh one begins a visit of the
-- prompt's own KL, one of replays alone adds to the last. Returns 0 when the step's were taken in before.
local m, step = meta(), tonumber(ARGV[1])
if step <= m.kl_step then return 0 end
call('HSET', K('meta'), 'kl_step', step)
for _, found in ipairs(cmsgpack.unpack(ARGV[2])) do
  local pid, k3, tokens, fresh = unpack(found)
  if call('HEXISTS', K('prompts'), pid) == 1 then
    local s = load_prompt(pid)
    local last = s.kls[#s.kls]
    if last and not fresh then
      last[1], last[2] = last[1] + k3, last[2] + tokens
    else
      s.kls[#s.kls + 1] = { k3, tokens }
      while #s.kls > m.hard_patience do table.remove(s.kls, 1) end
    end
    store_prompt(m, pid, s)
  end
end
return 1
