-- Every request is a batch of ids that no request of any thread or run sent before.
--
--   wrk -t2 -c16 -d10s -s bench/wrk/batch.lua http://127.0.0.1:8080 -- [RUN [IDS [FORM [WITH]]]]
--
-- RUN   a number of up to seven digits; the time serves if there is none
-- IDS   in each request                         1000
-- FORM  decimal, uuid (both text/plain), json,  decimal
--       items (JSON, an object for each id)
-- WITH  token: one for the batch, or for each of the items; key: the batch is under
--       one of 1,000 keys, or each of the items is under another

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  local form = args[3] or "decimal"
  with = args[4]
  -- An id is what the run and the thread begin, the number of the request, and its
  -- place in the batch: a body is made by one call, as wrk must be faster than the server.
  places = {}
  for i = 1, tonumber(args[2] or 1000) do
    places[i] = string.format("%04d", i)
    if form == "items" and with == "key" then
      places[i] = places[i] .. '","key":"campaign-' .. i % 1000
    elseif form == "items" and with == "token" then
      places[i] = places[i] .. string.format('","token":"7f3a9c41-5be2-4d10-a7c5-%012d', i)
    end
  end
  start, before, between, after = "", "", "\n", ""
  if form == "uuid" then
    start = string.format("%08d-%04d-4000-8000-0", run, number)
  else
    start = string.format("%d%d", run, number)
  end
  local type = "text/plain"
  if form == "json" then
    before, between, after, type = '["', '","', '"]', "application/json"
  elseif form == "items" then
    before, between, after, type = '[{"id":"', '"},{"id":"', '"}]', "application/json"
    with = nil -- is in the body
  end
  tail = " HTTP/1.1\r\nHost: verve\r\nContent-Type: " .. type .. "\r\nContent-Length: "
  n = 1000000
end

function request()
  n = n + 1
  local id = start .. n
  local body = before .. id .. table.concat(places, between .. id) .. after
  local query = ""
  if with == "token" then
    query = "?token=7f3a9c41-5be2-4d10-a7c5-00000" .. n
  elseif with == "key" then
    query = "?key=campaign-" .. n % 1000
  end
  return "POST /api/verve/accept" .. query .. tail .. #body .. "\r\n\r\n" .. body
end
