-- The state of a fresh group, in the hash `groups`; its trajectories are the values t:<gid>.<i>.
local function group(raw)
  local v = cmsgpack.unpack(raw)
  return {
    prompt = v[1], step = v[2], hinted = v[3], n = v[4], zero = v[5], successes = v[6], versions = v[7],
    advantages = v[8],
  }
end

local function tid_of(gid, i) return gid .. '.' .. string.format('%d', i) end
