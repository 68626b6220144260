-- ARGV: run id, layout, reconfigure 0|1, create 0|1, rules text, then field and value pairs of the rules. Creates the run's meta or
-- checks that it fits. Returns 1 when created.
local run = call('HGET', K('meta'), 'run_id')
if run and run ~= ARGV[1] then fail('SETUP', 'namespace ' .. P .. ' belongs to run ' .. run) end
local rules = {}
for i = 6, #ARGV do rules[#rules + 1] = ARGV[i] end
if run then
  local format = call('HGET', K('meta'), 'format')
  if format ~= ARGV[2] then
    fail('SETUP', 'namespace ' .. P .. ' has layout ' .. format .. ', this code has ' .. ARGV[2])
  end
  if ARGV[3] == '0' and call('HGET', K('meta'), 'rules') ~= ARGV[5] then
    for i = 1, #rules, 2 do
      local stored = call('HGET', K('meta'), rules[i])
      if stored ~= rules[i + 1] then
        fail('SETUP', 'run ' .. run .. ' was set up with ' .. rules[i] .. '=' .. tostring(stored) ..
          ', this client says ' .. rules[i + 1])
      end
    end
  end
else
  if ARGV[4] == '0' then fail('NORUN', 'no run under ' .. P) end
  if call('EXISTS', K('restoring')) == 1 and ARGV[3] == '0' then
    fail('SETUP', 'a restore of run ' .. ARGV[1] .. ' is under way or was cut short: restore it again')
  end
  call('HSET', K('meta'), 'run_id', ARGV[1], 'format', ARGV[2], 'version', 0, 'trained', -1, 'epoch', 0, 'snap', 0,
    'rbar_sum', 0, 'n_quarantine', 0, 'n_facts', call('HLEN', K('facts')), 'n_reuse', 0, 'n_drawn', 0)
end
local packed = {}
for i = 1, #rules, 2 do packed[rules[i]] = tonumber(rules[i + 1]) end
call('HSET', K('meta'), 'rules', ARGV[5], 'packed', cmsgpack.pack(packed), unpack(rules))
return run and 0 or 1
