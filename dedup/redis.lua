-- What an instance asks of Redis, in one atomic step each. DESIGN.md, "Many
-- instances: Redis", says why each is needed.
--
-- The only key named is the hash "sessions" of a lane; all others are its
-- neighbours, under the same prefix and so in the same slot:
--
--   sessions      hash: session -> what its last batch was answered, packed
--   size          decimals of the epoch sealed last, to size the next by
--   EPOCH:meta    hash: gen, run, n, nu, nt, nh, buckets, touched, hold, lost,
--                 twice; sealed and exact once the epoch is sealed
--   EPOCH:dN      set of integers: bucket N of the canonical decimals
--   EPOCH:u :t :h sets: UUIDs, short texts, digests of long texts
--
-- A blob is a row of ids, each: kind, length, two bytes of hash, the id.
-- Codes answer them, one byte each: 0 was there, 1 done, 2 in doubt, 3 failed
-- and not done, 4 is not there.

-- Set by main: a library that is being loaded sees none of these.
local byte, sub, find, concat, call, try
local DECIMAL = 100 -- 'd'

-- A session that has not been heard for so long does not keep others in doubt.
local LAPSE = 10
-- and one not heard for so long is forgotten.
local FORGET = 3600

local function clock()
  local t = call('TIME')
  return t[1] + t[2] / 1e6
end

local function run_id()
  return string.match(call('INFO', 'server'), 'run_id:(%x+)') or ''
end

local META = {'gen', 'sealed', 'n', 'buckets', 'touched', 'nu', 'nt', 'nh', 'hold', 'lost', 'twice'}

-- begin makes the meta of an epoch nobody has written to in this lane.
local function begin(P, mkey, gen, ttl)
  local last = tonumber(call('GET', P .. 'size') or 0)
  local buckets = 256
  while buckets < 4096 and buckets * 200 < last do buckets = buckets * 2 end
  call('HSET', mkey, 'gen', gen, 'run', run_id(), 'n', 0, 'buckets', buckets)
  call('EXPIRE', mkey, ttl)
  return buckets
end

-- doubts are the ids that other sessions have added to the epoch in their last
-- batches and may not have told anybody about.
local function doubts(skey, session, epoch, now)
  local all, found = call('HGETALL', skey), {}
  for i = 1, #all, 2 do
    if all[i] ~= session then
      local _, at, _, _, _, in_epoch, doubt = cmsgpack.unpack(all[i + 1])
      if in_epoch == epoch and doubt ~= '' and now - at < LAPSE then
        found[#found + 1] = doubt
      end
    end
  end
  return found
end

-- batch: session, sequence, mode, epoch, generation expected, blob, ttl, hold,
-- whether the session still has all ids that it would have to add again.
-- Modes: a add, l look, r take back, p replay what was lost, f replay what was
-- decided without Redis, b show that the session lives.
local function batch(skey, a, undo)
  local session, seq, mode, epoch, expect, blob = a[2], tonumber(a[3]), a[4], a[5], a[6], a[7]
  local ttl, hold = tonumber(a[8]), tonumber(a[9])
  local P = sub(skey, 1, -9)
  local state = call('HGET', skey, session)
  local last, _, codes0, gen0, n0 = 0
  if state then
    last, _, codes0, gen0, n0 = cmsgpack.unpack(state)
    if seq == last then return {'ok', codes0, gen0, n0} end
  end
  if seq < last then return {'old', '', '', last} end
  if seq ~= last + 1 then return {'gap', '', '', last} end

  local now = clock()
  local mkey = P .. epoch .. ':meta'
  local m = call('HMGET', mkey, unpack(META))
  local gen, n, buckets = m[1], tonumber(m[3] or 0), tonumber(m[4])
  if m[2] and mode ~= 'b' then return {'sealed'} end
  local replay = mode == 'p' or mode == 'f'
  if not replay then
    if expect ~= '' and gen ~= expect then return {'lost', '', gen or '', last} end
    if mode ~= 'b' and m[9] and now < tonumber(m[9]) then return {'hold'} end
  end

  if mode == 'b' then
    call('HSET', skey, session, cmsgpack.pack(seq, now, '', gen or '', n, epoch, ''))
    call('EXPIRE', skey, ttl)
    return {'ok', '', gen or '', n}
  end

  local fields = {}
  if not gen then
    gen = session .. ':' .. seq .. ':' .. now
    buckets = begin(P, mkey, gen, ttl)
    call('EXPIRE', skey, ttl)
  end
  if mode == 'p' then
    fields = {'lost', 1, 'hold', now + hold}
    if a[10] == '0' then fields[5], fields[6] = 'partly', 1 end
  end

  -- What the blob says, and which keys must be there.
  local touched = m[5] or ''
  if touched == '' then touched = string.rep('0', buckets) end
  local ids, keys, kinds, from, slot = {}, {}, {}, {}, {}
  local there, used, pos, count = {}, {}, 1, 0
  local dkey = P .. epoch .. ':d'
  local wide = {[117] = P .. epoch .. ':u', [116] = P .. epoch .. ':t', [104] = P .. epoch .. ':h'}
  local held = {[117] = tonumber(m[6] or 0), [116] = tonumber(m[7] or 0), [104] = tonumber(m[8] or 0)}
  local size = #blob
  while pos <= size do
    local kind, len, h1, h2 = byte(blob, pos, pos + 3)
    count = count + 1
    from[count], kinds[count] = pos, kind
    ids[count] = sub(blob, pos + 4, pos + 3 + len)
    if kind == DECIMAL then
      local b = (h1 * 256 + h2) % buckets
      local key = dkey .. b
      keys[count], slot[count] = key, b + 1
      if byte(touched, b + 1) == 49 then there[#there + 1] = key end
    else
      keys[count] = wide[kind]
      used[kind] = true
    end
    pos = pos + 4 + len
  end

  -- A key that should be there and is not was evicted, deleted, or its slot is
  -- on the move to or from here: nothing may be judged without it.
  if not replay then
    if #there > 0 and try('EXISTS', unpack(there)) ~= #there then return {'missing'} end
    for kind in pairs(used) do
      if try('SCARD', wide[kind]) ~= held[kind] then return {'missing'} end
    end
  end

  local codes, new = {}, 0
  if mode == 'l' then
    for i = 1, count do
      local r = try('SISMEMBER', keys[i], ids[i])
      codes[i] = r == 1 and '0' or r == 0 and '4' or '3'
    end
  elseif mode == 'r' then
    for i = 1, count do
      local r = try('SREM', keys[i], ids[i])
      codes[i] = r == 1 and '1' or r == 0 and '0' or '3'
      if r == 1 then
        new = new - 1
        if kinds[i] ~= DECIMAL then
          held[kinds[i]] = held[kinds[i]] - 1
        elseif call('EXISTS', keys[i]) == 0 then
          local s = slot[i]
          touched = sub(touched, 1, s - 1) .. '0' .. sub(touched, s + 1)
        end
      end
    end
  else
    local fresh = {}
    for i = 1, count do
      local r = try('SADD', keys[i], ids[i])
      if r == 1 then
        codes[i] = '1'
        new = new + 1
        undo[new * 2 - 1], undo[new * 2] = keys[i], ids[i]
        local kind, s = kinds[i], slot[i]
        if kind ~= DECIMAL then
          if held[kind] == 0 then call('EXPIRE', keys[i], ttl) end
          held[kind] = held[kind] + 1
        elseif byte(touched, s) ~= 49 and not fresh[s] then
          fresh[s] = true
          call('EXPIRE', keys[i], ttl)
        end
      elseif r == 0 then
        codes[i] = '0'
      else
        codes[i] = '3'
      end
    end
    if next(fresh) then
      local map = {}
      for i = 1, #touched do
        map[i] = fresh[i] and '1' or sub(touched, i, i)
      end
      touched = concat(map)
    end
  end
  n = n + new

  local doubt = ''
  if mode == 'a' and new == count then
    doubt = blob
  elseif mode == 'a' then
    local mine, others = {}
    for i = 1, count do
      if codes[i] == '1' then
        mine[#mine + 1] = sub(blob, from[i], from[i] + 3 + #ids[i])
      elseif codes[i] == '0' then
        others = others or doubts(skey, session, epoch, now)
        for j = 1, #others do
          if find(others[j], sub(blob, from[i], from[i] + 3 + #ids[i]), 1, true) then
            codes[i] = '2'
            break
          end
        end
      end
    end
    doubt = concat(mine)
  end
  if replay and new < count then
    local twice = tonumber(m[11] or 0)
    for i = 1, count do
      if codes[i] == '0' then twice = twice + 1 end
    end
    fields[#fields + 1], fields[#fields + 2] = 'twice', twice
  end

  local answer = concat(codes)
  if new ~= 0 or #fields > 0 then
    call('HSET', mkey, 'n', n, 'touched', touched, 'nu', held[117], 'nt', held[116], 'nh', held[104], unpack(fields))
  end
  call('HSET', skey, session, cmsgpack.pack(seq, now, answer, gen, n, epoch, doubt))
  return {'ok', answer, gen, n}
end

-- hello: session, sequence expected, new sequence. After a loss the session
-- goes on from a sequence that no batch still on its way can have.
local function hello(skey, a)
  local session, expect, seq = a[2], tonumber(a[3]), tonumber(a[4])
  local state, last = call('HGET', skey, session), 0
  if state then last = cmsgpack.unpack(state) end
  if last == seq then return {'ok'} end
  if last ~= expect then return {'gap', '', '', last} end
  call('HSET', skey, session, cmsgpack.pack(seq, clock(), '', '', 0, '', ''))
  call('EXPIRE', skey, tonumber(a[5]))
  return {'ok'}
end

-- drop deletes the ids of an epoch.
local function drop(prefix, touched)
  try('UNLINK', prefix .. ':u', prefix .. ':t', prefix .. ':h')
  local gone = {}
  for i = 1, #(touched or '') do
    if byte(touched, i) == 49 then gone[#gone + 1] = prefix .. ':d' .. (i - 1) end
    if #gone == 500 then
      try('UNLINK', unpack(gone))
      gone = {}
    end
  end
  if #gone > 0 then try('UNLINK', unpack(gone)) end
end

-- reset: epoch, generation. Some of its keys are lost: better all of them are,
-- for that every session notices, and adds its own again.
local function reset(skey, a)
  local prefix = sub(skey, 1, -9) .. a[2]
  local m = call('HMGET', prefix .. ':meta', 'gen', 'sealed', 'touched')
  if m[1] == a[3] and not m[2] then
    drop(prefix, m[3])
    call('DEL', prefix .. ':meta')
  end
  return {'ok'}
end

-- seal: epoch, seconds to keep the seal, seconds since which a session must have
-- been heard to be waited for. Answers the count and whether it is exact.
local function seal(skey, a)
  local P, epoch = sub(skey, 1, -9), a[2]
  local mkey = P .. epoch .. ':meta'
  local m = call('HMGET', mkey, 'sealed', 'exact', 'gen', 'n', 'run', 'switched', 'twice', 'lost', 'nu', 'nt', 'nh', 'buckets', 'touched', 'hold', 'partly')
  if m[1] then return {'sealed', m[1], m[2]} end
  local now, n, exact = clock(), tonumber(m[4] or 0), 1
  if m[14] and now < tonumber(m[14]) then return {'hold'} end
  if tonumber(m[7] or 0) > 0 or m[15] then exact = 0 end

  -- Another process than the one that began the epoch answers: a failover or a
  -- restart may have lost the last writes. Every session has to be heard again
  -- first, for only it knows whether its own are there.
  if m[3] and m[5] ~= run_id() then
    if not m[6] then
      m[6] = now
      call('HSET', mkey, 'switched', now)
    end
    local since, began = tonumber(m[6]), tonumber(string.match(epoch, '^%d+')) / 1000
    local all = call('HGETALL', skey)
    for i = 1, #all, 2 do
      local _, at = cmsgpack.unpack(all[i + 1])
      if at < since and at > began - LAPSE then
        if now - since < tonumber(a[4]) then return {'hold'} end
        exact = 0
      end
    end
  end

  -- Sessions that ended without a word leave their last batch behind.
  local sessions = call('HGETALL', skey)
  for i = 1, #sessions, 2 do
    local _, at = cmsgpack.unpack(sessions[i + 1])
    if now - at > FORGET then call('HDEL', skey, sessions[i]) end
  end

  call('HSET', mkey, 'sealed', n, 'exact', exact)
  call('EXPIRE', mkey, tonumber(a[3]))
  call('HDEL', mkey, 'touched')
  local wide = (m[9] or 0) + (m[10] or 0) + (m[11] or 0)
  call('SET', P .. 'size', n - wide, 'EX', 604800)
  drop(P .. epoch, m[13])
  return {'sealed', n, exact}
end

-- bye: session. It has nothing left to be asked about.
local function bye(skey, a)
  call('HDEL', skey, a[2])
  return {'ok'}
end

local function main(keys, a)
  byte, sub, find, concat = string.byte, string.sub, string.find, table.concat
  call, try = redis.call, redis.pcall
  local op = a[1]
  if op == 'batch' then
    -- Redis does not take back what a script has written when it fails.
    local undo = {}
    local ok, res = pcall(batch, keys[1], a, undo)
    if ok then return res end
    for i = 1, #undo, 2 do try('SREM', undo[i], undo[i + 1]) end
    if type(res) == 'table' then return res end
    return redis.error_reply(tostring(res))
  elseif op == 'seal' then
    return seal(keys[1], a)
  elseif op == 'reset' then
    return reset(keys[1], a)
  elseif op == 'hello' then
    return hello(keys[1], a)
  elseif op == 'bye' then
    return bye(keys[1], a)
  end
  return redis.error_reply('ERR verve: unknown operation')
end
