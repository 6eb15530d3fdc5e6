-- What an instance asks of Redis, in one atomic step each. DESIGN.md, "Many
-- instances: Redis", says why each is needed.
--
-- The only key named is the hash "sessions" of a lane; all others are its
-- neighbours, under the same prefix and so in the same slot:
--
--   sessions      hash: SESSION -> what its last batch was answered, packed, and
--                 "SESSION ids" -> the ids it has added, which are in doubt
--   EPOCH:meta    hash: gen, run, counts (of the ids of each kind, packed), hold,
--                 lost, partly, twice; sealed and exact once the epoch is sealed
--   EPOCH:d :u    sets: canonical decimals, UUIDs,
--         :t :h   short texts, digests of long texts
--
-- Lua hashes every byte of every string that is made, and a number in a command is
-- printed with 17 digits. Therefore ids come and stay in lists that are one string
-- each (MessagePack, one raw after another), and counts are packed.
--
-- Codes answer the ids of a batch, one byte each: 0 was there, 1 done, 2 in
-- doubt, 3 failed and not done, 4 is not there.

-- Set by main: a library that is being loaded sees none of these.
local sub, find, rep, concat, call, try
local pack, parse
local KINDS = {'d', 'u', 't', 'h'}

-- A session that has not been heard for so long does not keep others in doubt.
local LAPSE = 10
-- and one not heard for so long is forgotten.
local FORGET = 3600

local function clock()
  local t = call('TIME')
  return t[1] + t[2] / 1e6
end

local function run_id()
  local info = try('INFO', 'server') -- which the user may not be allowed to run
  return type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
end

local META = {'gen', 'sealed', 'counts', 'hold', 'twice'}

-- counts are how many ids of each kind there are, and of all.
local function counts(packed)
  local held, n = {0, 0, 0, 0}, 0
  if packed then held = {parse(packed)} end
  for k = 1, 4 do n = n + held[k] end
  return held, n
end

-- IDS makes the name of the field that holds a session's ids in doubt.
local IDS = ' ids'

-- begin makes the meta of an epoch that nobody has written to in this lane.
local function begin(mkey, gen, ttl)
  call('HSET', mkey, 'gen', gen, 'run', run_id())
  call('EXPIRE', mkey, ttl)
end

-- remember keeps what the batch of a session was answered, for the case that it
-- comes again, and which ids are in doubt for the others until the next one.
local function remember(skey, session, doubt, ...)
  call('HSET', skey, session, pack(...), session .. IDS, doubt)
end

-- doubts are the lists of ids that other sessions have added to the epoch in
-- their last batches and may not have told anybody about.
local function doubts(skey, session, epoch, now)
  local fields, found = call('HKEYS', skey), {}
  for i = 1, #fields do
    local other = sub(fields[i], 1, -#IDS - 1)
    if other ~= session and sub(fields[i], -#IDS) == IDS then
      local state = call('HGET', skey, other)
      if state then
        local _, at, _, _, _, in_epoch = parse(state)
        if in_epoch == epoch and now - at < LAPSE then found[#found + 1] = call('HGET', skey, fields[i]) end
      end
    end
  end
  return found
end

-- among tells whether an id is in one of the lists. That it takes the middle of
-- another id for it would make it wait, no more.
local function among(lists, id)
  local packed = pack(id)
  for i = 1, #lists do
    if find(lists[i], packed, 1, true) then return true end
  end
  return false
end

-- The way of one kind of ids in the set of key: what was added goes to undo. It
-- returns how many ids there are more, and the codes; no codes where all are 1.
local ways = {}

function ways.l(key, ids)
  local codes = call('SMISMEMBER', key, unpack(ids))
  for i = 1, #codes do codes[i] = codes[i] == 1 and '0' or '4' end
  return 0, codes
end

function ways.r(key, ids)
  return -call('SREM', key, unpack(ids))
end

function ways.a(key, ids, undo)
  local there, repeats = call('SMISMEMBER', key, unpack(ids)), 0
  for i = 1, #there do repeats = repeats + there[i] end
  local new, codes = ids
  if repeats > 0 then
    new, codes = {}, {}
    for i = 1, #there do
      if there[i] == 0 then
        codes[i] = '1'
        new[#new + 1] = ids[i]
      else
        codes[i] = '0'
      end
    end
    if #new == 0 then return 0, codes end
  end
  undo[#undo + 1] = {key, new}
  call('SADD', key, unpack(new))
  return #new, codes
end

-- batch: session, sequence, mode, epoch, generation expected, seconds to live,
-- seconds to hold, whether the session has all ids that it would have to add
-- again, and a list of ids of each kind.
-- Modes: a add, l look, r take back, p replay what was lost, f replay what was
-- decided without Redis, b show that the session lives.
local function batch(skey, a, undo)
  local session, seq, mode, epoch, expect = a[2], tonumber(a[3]), a[4], a[5], a[6]
  local ttl = a[7]
  local P = sub(skey, 1, -9)
  local state = call('HGET', skey, session)
  local last, _, codes0, gen0, n0 = 0
  if state then
    last, _, codes0, gen0, n0 = parse(state)
    if seq == last then return {'ok', codes0, gen0, n0} end
  end
  if seq < last then return {'old', '', '', last} end
  if seq ~= last + 1 then return {'gap', '', '', last} end

  local now = clock()
  local mkey = P .. epoch .. ':meta'
  local m = call('HMGET', mkey, unpack(META))
  local gen = m[1]
  local held, n = counts(m[3])
  local replay = mode == 'p' or mode == 'f'
  if m[2] and mode ~= 'b' then return {'sealed'} end
  if expect ~= '' and gen ~= expect then return {'lost', '', gen or '', last} end
  if not replay and mode ~= 'b' and m[4] and now < tonumber(m[4]) then return {'hold'} end

  if mode == 'b' then
    remember(skey, session, '', seq, now, '', gen or '', n, epoch)
    call('EXPIRE', skey, ttl)
    return {'ok', '', gen or '', n}
  end

  if not gen then
    gen = session .. ':' .. seq .. ':' .. now
    begin(mkey, gen, ttl)
  end
  local fields = {}
  if mode == 'p' then
    fields = {'lost', 1, 'hold', now + tonumber(a[8])}
    if a[9] == '0' then fields[5], fields[6] = 'partly', 1 end
  end

  local lists, parts, total, more = {}, {}, 0, 0
  local way = ways[mode] or ways.a
  for k = 1, 4 do
    if a[9 + k] ~= '' then
      local key, ids = P .. epoch .. ':' .. KINDS[k], {parse(a[9 + k])}
      -- A key that should be there and is not was evicted, deleted, or its slot
      -- is on the move to or from here: nothing may be judged without it.
      if not replay and try('SCARD', key) ~= held[k] then
        undo.missing = true
        error('missing')
      end
      local added, codes = way(key, ids, undo)
      if held[k] == 0 and added > 0 then call('EXPIRE', key, ttl) end
      held[k] = held[k] + added
      total, more = total + #ids, more + added
      lists[#lists + 1], parts[#parts + 1] = ids, codes or false
    end
  end
  n = n + more

  local doubt = ''
  if mode == 'a' and more == total then
    doubt = a[10] .. a[11] .. a[12] .. a[13]
  elseif mode == 'a' then
    local mine, others = {}
    for p, ids in ipairs(lists) do
      local codes = parts[p]
      for i = 1, #ids do
        if not codes or codes[i] == '1' then
          mine[#mine + 1] = pack(ids[i])
        elseif codes[i] == '0' then
          others = others or doubts(skey, session, epoch, now)
          if among(others, ids[i]) then codes[i] = '2' end
        end
      end
    end
    doubt = concat(mine)
  end
  if replay and more < total then
    fields[#fields + 1], fields[#fields + 2] = 'twice', tonumber(m[5] or 0) + total - more
  end

  for p, codes in ipairs(parts) do parts[p] = codes and concat(codes) or rep('1', #lists[p]) end
  local answer = concat(parts)
  if more ~= 0 then fields[#fields + 1], fields[#fields + 2] = 'counts', pack(unpack(held)) end
  if #fields > 0 then call('HSET', mkey, unpack(fields)) end
  remember(skey, session, doubt, seq, now, answer, gen, n, epoch)
  if not state then call('EXPIRE', skey, ttl) end
  return {'ok', answer, gen, n}
end

-- hello: session, sequence expected, new sequence. After a loss the session
-- goes on from a sequence that no batch still on its way can have.
local function hello(skey, a)
  local session, expect, seq = a[2], tonumber(a[3]), tonumber(a[4])
  local state, last = call('HGET', skey, session), 0
  if state then last = parse(state) end
  if last == seq then return {'ok'} end
  if last ~= expect then return {'gap', '', '', last} end
  remember(skey, session, '', seq, clock(), '', '', 0, '')
  call('EXPIRE', skey, tonumber(a[5]))
  return {'ok'}
end

-- drop deletes the ids of an epoch.
local function drop(prefix)
  for k = 1, 4 do try('UNLINK', prefix .. ':' .. KINDS[k]) end
end

-- reset: epoch, generation. Some of its keys are lost: better all of them are,
-- for that every session notices, and adds its own again.
local function reset(skey, a)
  local prefix = sub(skey, 1, -9) .. a[2]
  local m = call('HMGET', prefix .. ':meta', 'gen', 'sealed')
  if m[1] == a[3] and not m[2] then
    drop(prefix)
    call('DEL', prefix .. ':meta')
  end
  return {'ok'}
end

-- seal: epoch, seconds to keep the seal, seconds since which a session must have
-- been heard to be waited for. Answers the count and whether it is exact.
local function seal(skey, a)
  local P, epoch = sub(skey, 1, -9), a[2]
  local mkey = P .. epoch .. ':meta'
  local m = call('HMGET', mkey, 'sealed', 'exact', 'gen', 'counts', 'run', 'switched', 'twice', 'hold', 'partly')
  if m[1] then return {'sealed', m[1], m[2]} end
  local now, exact = clock(), 1
  local _, n = counts(m[4])
  if m[8] and now < tonumber(m[8]) then return {'hold'} end
  if tonumber(m[7] or 0) > 0 or m[9] then exact = 0 end

  local heard, all = {}, call('HGETALL', skey)
  for i = 1, #all, 2 do
    if sub(all[i], -#IDS) ~= IDS then
      local _, at = parse(all[i + 1])
      heard[all[i]] = at
    end
  end

  -- Another process than the one that began the epoch answers: a failover or a
  -- restart may have lost the last writes. Every session has to be heard again
  -- first, for only it knows whether its own are there.
  if m[3] and m[5] ~= run_id() then
    if not m[6] then
      m[6] = now
      call('HSET', mkey, 'switched', now)
    end
    local since, began = tonumber(m[6]), tonumber(string.match(epoch, '^%d+')) / 1000
    for _, at in pairs(heard) do
      if at < since and at > began - LAPSE then
        if now - since < tonumber(a[4]) then return {'hold'} end
        exact = 0
      end
    end
  end

  -- Sessions that ended without a word leave their last batch behind.
  for session, at in pairs(heard) do
    if now - at > FORGET then call('HDEL', skey, session, session .. IDS) end
  end

  call('HSET', mkey, 'sealed', n, 'exact', exact)
  call('EXPIRE', mkey, tonumber(a[3]))
  drop(P .. epoch)
  return {'sealed', n, exact}
end

-- bye: session. It has nothing left to be asked about.
local function bye(skey, a)
  call('HDEL', skey, a[2], a[2] .. IDS)
  return {'ok'}
end

-- rights runs, on a key of its own, each command that is needed here and by the
-- ledger. It answers those that the user may not run.
local function rights(skey)
  local key = sub(skey, 1, -9) .. 'rights'
  local lacks = {}
  for _, c in ipairs({
    {'TIME'}, {'SET', key, 1, 'EX', 60}, {'GET', key}, {'DEL', key},
    {'HSET', key, 'f', 1}, {'EXPIRE', key, 60}, {'PEXPIRE', key, 60000}, {'HGET', key, 'f'}, {'HMGET', key, 'f'},
    {'HGETALL', key}, {'HKEYS', key}, {'HEXISTS', key, 'f'}, {'HDEL', key, 'f'},
    {'SADD', key, 'm'}, {'SCARD', key}, {'SISMEMBER', key, 'm'}, {'SMISMEMBER', key, 'm'}, {'SREM', key, 'm'},
    {'ZADD', key, 1, 'm'}, {'ZSCORE', key, 'm'}, {'ZRANGE', key, 0, -1}, {'ZRANGEBYSCORE', key, 0, 1}, {'ZREM', key, 'm'},
    {'EXISTS', key}, {'UNLINK', key},
  }) do
    local r = try(unpack(c))
    local err = type(r) == 'table' and r.err or ''
    if find(err, "can't run", 1, true) or find(err, 'permissions to run', 1, true) then
      lacks[#lacks + 1] = '+' .. string.lower(c[1])
    elseif find(err, "can't access", 1, true) or find(err, 'permissions to access', 1, true) then
      return {'lacks', '~verve:*', '', 0}
    end
  end
  if #lacks > 0 then return {'lacks', concat(lacks, ' '), '', 0} end
  return {'ok', '', '', 0}
end

local function main(keys, a)
  sub, find, rep, concat = string.sub, string.find, string.rep, table.concat
  pack, parse = cmsgpack.pack, cmsgpack.unpack
  call, try = redis.call, redis.pcall
  local op = a[1]
  if op == 'batch' then
    -- Redis does not take back what a script has written when it fails.
    local undo = {}
    local ok, res = pcall(batch, keys[1], a, undo)
    if ok then return res end
    for i = 1, #undo do try('SREM', undo[i][1], unpack(undo[i][2])) end
    if undo.missing then return {'missing'} end
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
  elseif op == 'rights' then
    return rights(keys[1])
  end
  return redis.error_reply('ERR verve: unknown operation')
end
