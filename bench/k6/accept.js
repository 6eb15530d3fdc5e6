// What the scripts beside this one share: a request with an id, and what its
// answer may be. A repeat is refused with 409, which is an answer as good as
// any other here.
//
// URL         of the server                        http://127.0.0.1:8080
// DUPLICATES  share of requests that repeat an id  0.1
// ENDPOINT    callback that each request asks for  none
// P95, P99    bounds of the time to answer, ms     50, 100
import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter, Rate } from 'k6/metrics';

export const url = __ENV.URL || 'http://127.0.0.1:8080';
const duplicates = Number(__ENV.DUPLICATES || 0.1);
const endpoint = __ENV.ENDPOINT ? `&endpoint=${encodeURIComponent(__ENV.ENDPOINT)}` : '';

// Without this every repeat would count as http_req_failed.
http.setResponseCallback(http.expectedStatuses(200, 409));

const unique = new Counter('verve_ok');
const repeats = new Counter('verve_duplicate');
const wrong = new Rate('verve_wrong_answer');

export const latency = [`p(95)<${__ENV.P95 || 50}`, `p(99)<${__ENV.P99 || 100}`];

// Whatever the load, these hold.
export const always = {
  verve_wrong_answer: ['rate==0'],
  checks: ['rate==1'],
};

// Where the server is not to be overloaded, these too: neither 503 nor broken
// connections, and k6 itself keeps up.
export const unhurried = {
  ...always,
  http_req_failed: ['rate<0.001'],
  http_req_duration: latency,
  dropped_iterations: ['rate<1'],
};

// A scenario that begins so many iterations a second, whatever the answers take.
// The arguments are what holds without RATE, DURATION and VUS.
export function steady(rate, duration, users) {
  const vus = Number(__ENV.VUS || users);
  return {
    executor: 'constant-arrival-rate',
    rate: Number(__ENV.RATE || rate),
    timeUnit: '1s',
    duration: __ENV.DURATION || duration,
    preAllocatedVUs: vus,
    maxVUs: 10 * vus,
  };
}

// A run has ids of its own: its number, the virtual user's, and a counter, 19
// digits that are a number below 2^64.
export function setup() {
  return { run: 100000 + Math.floor(Math.random() * 800000) };
}

let sent = 0; // new ids of this virtual user

export function accept({ run }) {
  const repeat = sent > 0 && Math.random() < duplicates;
  const n = repeat ? Math.ceil(Math.random() * sent) : ++sent;
  const id = `${run}${String(exec.vu.idInTest).padStart(5, '0')}${String(n).padStart(8, '0')}`;

  // One name for all ids: else k6 keeps a metric for each.
  const answer = http.get(`${url}/api/verve/accept?id=${id}${endpoint}`, { tags: { name: 'accept' } });

  // A repeat may be new again when the window has turned; a new id is never a
  // repeat. http_req_failed counts requests without an answer, or with 503.
  const ok = answer.status === 200 && answer.body === 'ok';
  const failed = answer.status === 409 && answer.body === 'failed';
  const refused = answer.status === 503 && answer.body === 'failed' && answer.headers['Retry-After'] !== undefined;
  unique.add(ok);
  repeats.add(failed);
  wrong.add(answer.status !== 0 && !ok && !refused && !(failed && repeat));
  if (answer.status !== 0) {
    check(answer, { 'ok, failed for a repeat, or 503 with Retry-After': () => ok || refused || (failed && repeat) });
  }
}
