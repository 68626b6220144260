-- ARGV: role/id, progress. Stamps the heartbeat with Redis' clock, the only one.
call('HSET', K('beats'), ARGV[1], cmsgpack.pack({ now_ms(), tonumber(ARGV[2]) }))
return 1
