-- ARGV: version, fencing token or UNCHECKED. Versions only grow; publishing the current one again changes nothing.
local m, version = meta(), tonumber(ARGV[1])
if tonumber(ARGV[2]) ~= UNCHECKED then check_token(m, ARGV[2]) end
if version < m.version then fail('VERSION', 'version ' .. ARGV[1] .. ' is older than ' .. m.version) end
call('HSET', K('meta'), 'version', version)
return version
