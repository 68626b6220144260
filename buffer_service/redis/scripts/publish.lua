-- ARGV: version, epoch (-1: unchecked). Versions only grow; publishing the current one again changes nothing.
local m, version = meta(), tonumber(ARGV[1])
if tonumber(ARGV[2]) >= 0 and tonumber(ARGV[2]) ~= m.epoch then
  fail('FENCED', 'epoch ' .. ARGV[2] .. ' is over, ' .. m.epoch .. ' has begun')
end
if version < m.version then fail('VERSION', 'version ' .. ARGV[1] .. ' is older than ' .. m.version) end
call('HSET', K('meta'), 'version', version)
return version
