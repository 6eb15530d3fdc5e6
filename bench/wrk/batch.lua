-- Every request is a batch of ids that no request of any thread or run sent before.
--
--   wrk -t2 -c16 -d10s -s bench/wrk/batch.lua http://127.0.0.1:8080 -- [RUN [IDS [FORM]]]
--
-- RUN   a number of up to seven digits; the time serves if there is none
-- IDS   in each request                         1000
-- FORM  decimal, uuid (both text/plain), json   decimal

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  local form = args[3] or "decimal"
  -- An id is what the run and the thread begin, the number of the request, and its
  -- place in the batch: a body is made by one call, as wrk must be faster than the server.
  places = {}
  for i = 1, tonumber(args[2] or 1000) do
    places[i] = string.format("%04d", i)
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
  end
  head = "POST /api/verve/accept HTTP/1.1\r\nHost: verve\r\nContent-Type: " .. type .. "\r\nContent-Length: "
  n = 1000000
end

function request()
  n = n + 1
  local id = start .. n
  local body = before .. id .. table.concat(places, between .. id) .. after
  return head .. #body .. "\r\n\r\n" .. body
end
