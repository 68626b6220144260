-- ARGV: role/id, progress, host, pid. Stamps the heartbeat with Redis' clock, the only one.
call('HSET', K('beats'), ARGV[1], cmsgpack.pack({ now_ms(), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4]) }))
return 1
