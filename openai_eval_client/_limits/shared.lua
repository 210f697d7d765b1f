-- The quota of one model, shared by all workers: asked and told in one atomic step.
--
-- Each dimension (1 requests, 2 tokens) is a line. `taken` counts all that was ever reserved in it; each of
-- its two buckets, the configured and the server's, has released `free` of it so far, at most `size` more
-- than was taken. A reservation that ends at place p may go once both have released p. When that is follows
-- from `free` and `rate`, which the reply holds: nobody asks twice, and what changes them moves all places.
--
-- KEYS: the state; the workers and when each was heard of last.
-- ARGV: what the worker asks and tells, in JSON (_shared.py, _pending.py). The constants come from _redis.py.

local told = cjson.decode(ARGV[1])

local function clock()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1e6
end

local now = told.now or clock()

local function new_line(rate, size)
  local line = {
    taken = 0, gone = 0, holes = {}, lowest_until = 0, configured = { rate = rate, size = size, free = size },
    spoken = false, fresh = 0, heard_at = now, passed = 0,
    cut_at = 0, cut_taken = 0, cut_passed = 0, cut_rate = 0, first_cut = 0, busy_from = now, busy_taken = 0, last = now,
  }
  if told.adapts and rate < UNLIMITED then
    local first = math.max(math.min(rate * FIRST_SECONDS, size), 1)
    line.server = { rate = rate, size = first, free = first }
  end
  return line
end

local function buckets(line)
  return { line.configured, line.server }
end

-- Besides, each bucket notes what had been taken when it was last so full, in sixteenths.
local STEPS = 16

local function add(line, bucket, amount)
  if not bucket then return end
  bucket.free = math.min(bucket.free + amount, line.taken + bucket.size)
  bucket.peaks = bucket.peaks or {}
  for step = 1, math.ceil((bucket.free - line.taken) / bucket.size * STEPS) do bucket.peaks[step] = line.taken end
end

-- Gives a place back that nobody needs, but for what would have run over in between had it not been taken.
local function give_back(line, bucket, hole)
  local peak = 0
  for step, taken in ipairs(bucket.peaks or {}) do
    if taken > hole.place then peak = step end
  end
  add(line, bucket, math.min(hole.amount, bucket.size * (1 - peak / STEPS)))
end

local function come_up(line)
  return math.min(line.taken, line.configured.free, line.server and line.server.free or line.taken)
end

-- Notes what has been sent by now: all whose place has come up, but for the time of a pause. A place that was
-- given back is skipped when it comes up, not before: those ahead of it must not go sooner.
local function let_go(quota)
  for _, line in ipairs(quota.lines) do
    local ahead = {}
    for _, hole in ipairs(line.holes) do
      if hole.place > come_up(line) then
        ahead[#ahead + 1] = hole
      else
        for _, bucket in ipairs(buckets(line)) do give_back(line, bucket, hole) end
      end
    end
    line.holes = ahead
    if now >= quota.pause then line.gone = math.max(line.gone, come_up(line)) end
  end
end

local function refill(quota)
  local seconds = math.max(now - quota.at, 0)
  quota.at = now
  for _, line in ipairs(quota.lines) do
    for _, bucket in ipairs(buckets(line)) do
      add(line, bucket, bucket.rate * seconds)
    end
  end
  let_go(quota)
end

-- Of the limits that live workers have set, the lowest holds: who sets it renews it, and others raise it
-- when nobody has for a while.
local function agree(line, rate, size)
  local configured = line.configured
  if rate <= configured.rate or now >= line.lowest_until then
    configured.rate, configured.size = rate, size
    add(line, configured, 0)
    line.lowest_until = now + ALIVE_SECONDS
  end
end

-- The server's word, from the answer to the freshest request: see _belief.py, whose two readings these are.
local function hear(line, quota)
  local at = now - quota.age
  if at < line.fresh then return end
  local had = line.server
  -- Of those who set out together at first, or after a pause, nobody knows who arrived before it: none of
  -- them counts. A late answer from before the pause keeps its place.
  local place = at < line.busy_from + TRANSIT and math.min(line.busy_taken, quota.place) or quota.place
  local free = math.min(line.gone, place + quota.rate * quota.age) + quota.left
  free = math.max(free, line.gone) - quota.rate * TRANSIT
  if line.spoken and had and free > had.free then
    free = had.free + (free - had.free) * (1 - math.exp(-(now - line.heard_at) / SMOOTHING))
  end
  line.server = { rate = quota.rate, size = quota.size, free = free }
  add(line, line.server, 0)
  line.spoken, line.fresh, line.heard_at = true, at, now
end

local function ceiling(line)
  return line.configured.rate < UNLIMITED and line.configured.rate or nil
end

-- A silent server had room for it: before the first refusal there may be more, after it the rate comes back.
local function passed(line, amount)
  line.passed = line.passed + amount
  local server, most = line.server, ceiling(line)
  if line.spoken or not server then return end
  if line.cut_at == 0 then
    local room = math.max(math.min(GROWTH * amount, line.configured.size - server.size), 0)
    server.size, server.free = server.size + room, server.free + room
    return
  end
  local seconds = now - line.cut_at
  local rate = most and math.min(line.cut_rate + CREEP * most * seconds, most)
    or line.cut_rate * (1 + UNBOUNDED_CREEP) ^ math.min(seconds, 1000)
  if rate > server.rate * (1 + CREEP / 2) then server.rate = rate end
end

-- Lowers the rate of a silent server, once for all that had their place before it was lowered last.
local function slow_down(line, amount, place)
  local server, rate = line.server, nil
  if not server or (not ceiling(line) and place <= line.first_cut) then
    rate = math.max(CUT * (line.taken - line.busy_taken) / math.max(now - line.busy_from, 1), amount)
    if server then rate = math.min(rate, server.rate) else line.first_cut = line.taken end
  elseif place > line.cut_taken then
    local seconds = now - line.cut_at
    rate = server.rate * CUT
    if seconds >= SURE_SECONDS and line.cut_at >= line.busy_from then
      local measured = (line.passed - line.cut_passed) / seconds
      rate = math.min(math.max(measured, server.rate * CUT ^ 2), server.rate)
    end
  else
    return
  end
  line.server = { rate = rate, size = server and server.size or math.max(rate, 1), free = line.gone }
  line.cut_at, line.cut_taken, line.cut_passed, line.cut_rate = now, line.taken, line.passed, rate
end

-- After the wait there is room for the refused one, and the refill paces the rest.
local function refused(line, refusal)
  if refusal.amount <= 0 then return end
  line.spoken = line.spoken and refusal.spoke
  if told.adapts and not line.spoken then
    add(line, line.server, refusal.amount)
    slow_down(line, refusal.amount, refusal.place)
  end
  local bucket = told.adapts and line.server or line.configured
  bucket.free = math.min(bucket.free, line.gone + refusal.amount - refusal.wait * bucket.rate)
end

local function take_in(quota, lost)
  for i, line in ipairs(quota.lines) do
    if told.spent and not lost then
      for _, bucket in ipairs(buckets(line)) do bucket.free = bucket.free - told.spent[i] end
    end
    for _, place in ipairs(not lost and told.back or {}) do
      if place[i] < line.taken then
        line.holes[#line.holes + 1] = { place = place[i], amount = i == 1 and 1 or place[3] }
      end
    end
    if told.credit then add(line, line.configured, told.credit[i]) end
    if told.owed and not line.spoken then add(line, line.server, -told.owed[i]) end
    if told.served then passed(line, told.served[i]) end
  end
  for _, refusal in ipairs(told.refused or {}) do refused(quota.lines[refusal.line], refusal) end
  for _, word in ipairs(told.heard or {}) do hear(quota.lines[word.line], word) end
  quota.pause = math.max(quota.pause, now + (told.pause or 0))
end

local function wait_for(quota, amounts)
  local wait = quota.pause - now
  for i, line in ipairs(quota.lines) do
    for _, bucket in ipairs({ line.configured, told.adapts and line.server or nil }) do
      local missing = line.taken + math.min(amounts[i], bucket.size) - bucket.free
      if missing > bucket.size * ROUNDING then wait = math.max(wait, missing / bucket.rate) end
    end
  end
  return wait
end

-- Reserves for all that can go now, and for the first that has to wait: a worker waits for one at a time,
-- so workers take turns.
local function reserve(quota)
  for count, tokens in ipairs(told.wants) do
    local amounts = { 1, tokens }
    local wait = wait_for(quota, amounts)
    for i, line in ipairs(quota.lines) do
      if now - line.last > IDLE_SECONDS then line.busy_from, line.busy_taken = now, line.taken end
      line.last, line.taken = now, line.taken + amounts[i]
    end
    if wait > 0 then return count end
  end
  return #told.wants
end

local function count_workers()
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ALIVE_SECONDS)
  redis.call(told.leaves and 'ZREM' or 'ZADD', KEYS[2], unpack(told.leaves and { told.worker } or { now, told.worker }))
  redis.call('EXPIRE', KEYS[2], told.keep)
  return redis.call('ZCARD', KEYS[2])
end

local packed = redis.call('GET', KEYS[1])
local quota = packed and cmsgpack.unpack(packed)
local lost = told.epoch ~= 0 and not (quota and quota.epoch == told.epoch)
if not quota then
  quota = { epoch = now, at = now, ahead = 0, pause = 0, lines = {} }
  for i = 1, 2 do quota.lines[i] = new_line(told.rates[i], told.sizes[i]) end
end
now = now + quota.ahead
if now < quota.at then -- Redis's clock was set back: go on from where it was
  quota.ahead, now = quota.ahead + quota.at - now, quota.at
end
refill(quota)
for i, line in ipairs(quota.lines) do agree(line, told.rates[i], told.sizes[i]) end
if lost and not quota.inherited then -- somebody has spent what this state does not know of: begin empty
  quota.inherited = true
  for _, line in ipairs(quota.lines) do
    for _, bucket in ipairs(buckets(line)) do bucket.free = math.min(bucket.free, line.taken) end
  end
end
take_in(quota, lost)
let_go(quota)
local starts = { quota.lines[1].taken, quota.lines[2].taken }
local reserved = reserve(quota)
let_go(quota)
redis.call('SET', KEYS[1], cmsgpack.pack(quota), 'EX', told.keep)

local reply = { quota.epoch, now - quota.epoch, count_workers(), reserved, quota.pause - now }
for i, line in ipairs(quota.lines) do
  reply[#reply + 1] = starts[i]
  for _, bucket in ipairs({ line.configured, told.adapts and line.server or line.configured }) do
    for _, number in ipairs({ bucket.free, bucket.rate, bucket.size }) do reply[#reply + 1] = number end
  end
  reply[#reply + 1] = line.spoken and 1 or 0
end
for i, number in ipairs(reply) do reply[i] = string.format('%.17g', number) end
return reply
