-- Takes a token from the bucket KEYS[1] and returns 0. If there is none, returns the
-- number of nanoseconds until there is one.
--
-- ARGV: the interval between tokens, and the time in which an empty bucket fills up.
-- Each is given as seconds and nanoseconds, because numbers in Lua are exact only up
-- to 2^53.
--
-- A bucket is stored as in async_proxy's memory: as the time at which it will be full,
-- since 1970. A full bucket is not stored.

local function add(s, ns, s2, ns2)
	s, ns = s + s2, ns + ns2
	if ns >= 1e9 then
		return s + 1, ns - 1e9
	end
	return s, ns
end

local function before(s, ns, s2, ns2)
	return s < s2 or (s == s2 and ns < ns2)
end

local interval_s, interval_ns = tonumber(ARGV[1]), tonumber(ARGV[2])
local fill_s, fill_ns = tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now_s, now_ns = tonumber(time[1]), tonumber(time[2]) * 1000
local empty_s, empty_ns = add(now_s, now_ns, fill_s, fill_ns) -- when a bucket that is empty now will be full

-- A value that is not a time, or not a string, is not a bucket, and is overwritten. Any
-- other error is returned. A time later than that of an empty bucket dates from before
-- the clock was set back: the bucket counts as empty.
local full_s, full_ns = now_s, now_ns
local kept = redis.pcall('GET', KEYS[1])
if type(kept) == 'table' and not string.find(kept.err, 'WRONGTYPE', 1, true) then
	return kept
end
local s, ns = string.match(type(kept) == 'string' and kept or '', '^(%d+)%.(%d%d%d%d%d%d%d%d%d)$')
if s then
	s, ns = tonumber(s), tonumber(ns)
	if before(empty_s, empty_ns, s, ns) then
		full_s, full_ns = empty_s, empty_ns
	elseif before(now_s, now_ns, s, ns) then
		full_s, full_ns = s, ns
	end
end

full_s, full_ns = add(full_s, full_ns, interval_s, interval_ns)
if before(empty_s, empty_ns, full_s, full_ns) then
	return (full_s - empty_s) * 1e9 + full_ns - empty_ns
end
-- The key expires in the first millisecond after the bucket is full. The expiry is
-- absolute: Redis would count a relative one from the start of the current millisecond.
local gone = full_s * 1000 + math.floor(full_ns / 1e6) + 1
redis.call('SET', KEYS[1], string.format('%d.%09d', full_s, full_ns), 'PXAT', string.format('%d', gone))
return 0
