-- wrk's side of load/wrk.py: POST the same body again and again, and say what came of it in one
-- line that a program can read. Arguments (after --): path, "numbered" or "same", a file with the
-- body, Prefer header. "numbered" gives each request a path of its own: the path and a number.

local head, tail, whole, number

function init(args)
  wrk.method = "POST"
  local file = assert(io.open(args[3], "rb"))
  wrk.body = file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = "application/json"
  if args[4] then
    wrk.headers["Prefer"] = args[4]
  end
  -- Format once, cut at the place of the number: what wrk saves here, the server gets.
  local text = wrk.format(nil, args[1] .. "@@")
  local at = text:find("@@", 1, true)
  head, tail, number = text:sub(1, at - 1), text:sub(at + 2), nil
  if args[2] == "numbered" then
    number = 0
  end
  whole = head .. tail
end

function request()
  if number == nil then
    return whole
  end
  number = number + 1
  return head .. number .. tail
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    "RESULT requests=%d duration_us=%d p50_us=%d p99_us=%d status=%d connect=%d read=%d write=%d timeout=%d\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
