-- Sixteen requests are sent at once, each with an id of its own as in
-- unique.lua.
--
--   wrk -t2 -c64 -d10s -s bench/wrk/pipelined.lua http://127.0.0.1:8080 -- [RUN]

local depth = 16
local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  local head = string.format("GET /api/verve/accept?id=%d%02d", run, number)
  local tail = " HTTP/1.1\r\nHost: verve\r\n\r\n"
  parts = {}
  for i = 1, depth do
    parts[3 * i - 2], parts[3 * i] = head, tail
  end
  n = 1000000000
end

function request()
  for i = 2, 3 * depth, 3 do
    n = n + 1
    parts[i] = n
  end
  return table.concat(parts)
end
