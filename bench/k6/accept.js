// Load on the accept route for k6: every iteration brings an id, and a repeat
// is refused with 409, which is an answer as good as any other here.
//
//   k6 run bench/k6/accept.js
//   k6 run -e URL=http://10.0.0.5:8080 -e RATE=20000 -e DURATION=2m -e DUPLICATES=0.9 bench/k6/accept.js
//
// URL         of the server                          http://127.0.0.1:8080
// RATE        requests a second; 0: each virtual     0
//             user sends when it has its answer
// VUS         virtual users                          50
// DURATION    how long                               30s
// DUPLICATES  share of requests that repeat an id    0.1
// ENDPOINT    callback that each request asks for    none
// P95, P99    thresholds of the time to answer, ms   50, 100
import { check } from 'k6';
import http from 'k6/http';
import { Counter, Rate } from 'k6/metrics';

const url = __ENV.URL || 'http://127.0.0.1:8080';
const rate = Number(__ENV.RATE || 0);
const vus = Number(__ENV.VUS || 50);
const duration = __ENV.DURATION || '30s';
const duplicates = Number(__ENV.DUPLICATES || 0.1);
const endpoint = __ENV.ENDPOINT ? `&endpoint=${encodeURIComponent(__ENV.ENDPOINT)}` : '';

// Without this every repeat would count as http_req_failed.
http.setResponseCallback(http.expectedStatuses(200, 409));

const unique = new Counter('verve_ok');
const repeats = new Counter('verve_duplicate');
const wrong = new Rate('verve_wrong_answer');

export const options = {
  scenarios: {
    accept: rate > 0
      ? { executor: 'constant-arrival-rate', rate, timeUnit: '1s', duration, preAllocatedVUs: vus, maxVUs: 10 * vus }
      : { executor: 'constant-vus', vus, duration },
  },
  thresholds: {
    http_req_failed: ['rate<0.001'], // 503, 4xx but 409, broken connections
    verve_wrong_answer: ['rate==0'],
    http_req_duration: [`p(95)<${__ENV.P95 || 50}`, `p(99)<${__ENV.P99 || 100}`],
    checks: ['rate==1'],
  },
};

// Ids of a run: its start, the virtual user and a counter, so that none comes
// twice but by intent.
export function setup() {
  return { run: Date.now() % 100000 };
}

let sent = 0;

export default function ({ run }) {
  const repeat = sent > 0 && Math.random() < duplicates;
  const n = repeat ? Math.ceil(Math.random() * sent) : ++sent;
  const id = `${run + 100000}${String(__VU).padStart(5, '0')}${String(n).padStart(8, '0')}`;

  // One name for all ids: else k6 keeps a metric for each.
  const answer = http.get(`${url}/api/verve/accept?id=${id}${endpoint}`, { tags: { name: 'accept' } });

  // A repeat may be new again when the minute has turned; a new id is never a
  // repeat.
  const ok = answer.status === 200 && answer.body === 'ok';
  const failed = answer.status === 409 && answer.body === 'failed';
  unique.add(ok);
  repeats.add(failed);
  wrong.add(!ok && !(failed && repeat));
  check(answer, { 'answered ok, or failed for a repeat': () => ok || (failed && repeat) });
}
