// Every kind of answer once, and the count they add up to: a minute after a
// deployment, from where the callers are.
//
//   k6 run -e URL=http://10.0.0.5:8080 bench/k6/smoke.js
//
// URL    of the public listener  http://127.0.0.1:8080
// ADMIN  of the admin listener   http://127.0.0.1:8081; none: without the count
//
// The count is compared if nobody else sends ids meanwhile.
import { check } from 'k6';
import http from 'k6/http';
import { url } from './accept.js';

const admin = __ENV.ADMIN || 'http://127.0.0.1:8081';

export const options = {
  vus: 1,
  iterations: 1,
  thresholds: { checks: ['rate==1'] },
};

const accept = (query, params = {}) => http.get(`${url}/api/verve/accept${query}`, { tags: { name: 'accept' }, ...params });
const says = (status, body, reason) => (r) => r.status === status && r.body === body && r.headers['Verve-Reason'] === reason;

const windows = () => http.get(`${admin}/api/windows`).json();

// How many ids were counted from a window on.
function counted(from, { open, windows }) {
  const since = windows.filter((w) => Date.parse(w.window_start) >= Date.parse(from));
  return since.reduce((sum, w) => sum + w.unique, open.unique);
}

export default function () {
  const before = admin === 'none' ? undefined : windows().open;
  const id = `smoke-${Date.now()}-${Math.floor(Math.random() * 1e9)}`;

  // The window may turn between two requests, once.
  check(accept(`?id=${id}`), { 'a new id is ok': says(200, 'ok') });
  let again = accept(`?id=${id}`);
  let ok = 1;
  if (again.status === 200) {
    ok++;
    again = accept(`?id=${id}`);
  }
  check(again, { 'a repeat is failed': says(409, 'failed', 'duplicate') });

  check(accept(''), { 'no id is refused': says(400, 'failed', 'bad-id') });
  check(accept('?id='), { 'an empty id is refused': says(400, 'failed', 'bad-id') });
  check(accept('?id=1&id=2'), { 'two ids are refused': says(400, 'failed', 'bad-id') });
  check(accept('?id=%zz'), { 'a bad escape is refused': says(400, 'failed', 'bad-id') });
  check(accept(`?id=${id}-e&endpoint=http://169.254.169.254/`), { 'an internal endpoint is refused': says(400, 'failed', 'bad-endpoint') });
  check(http.put(`${url}/api/verve/accept?id=${id}-p`), { 'PUT is refused': says(405, 'failed', 'method') });
  check(http.get(`${url}/api/verve/`), { 'another path is not found': says(404, 'failed', 'not-found') });
  check(http.post(`${url}/test`, '{}'), { '/test takes a POST': says(200, 'ok') });

  check(http.post(`${url}/api/verve/accept?id=${id}-p`), { 'a POST of a new id is ok': says(200, 'ok') });
  const batch = http.post(`${url}/api/verve/accept`, JSON.stringify([`${id}-a`, `${id}-b`, `${id}-a`, '']), { headers: { 'Content-Type': 'application/json' } });
  check(batch, {
    'a batch has a verdict for each id': (r) => r.status === 200 && r.json('results').join() === 'ok,ok,duplicate,bad-id',
    'a batch that cannot be parsed is refused': () => says(400, 'failed', 'bad-request')(http.post(`${url}/api/verve/accept`, '[', { headers: { 'Content-Type': 'application/json' } })),
  });
  ok += 1 + (batch.json('ok') || 0);

  if (admin === 'none') {
    return;
  }
  check(http.get(`${admin}/readyz`), { 'it is ready': (r) => r.status === 200 && r.json('ready') === true });
  check(http.get(`${admin}/metrics`), { 'it has metrics': (r) => r.body.includes('verve_accept_total{result="ok"}') });
  const sum = counted(before.window_start, windows()) - before.unique;
  check(sum, { 'the count is that of the ok answers': () => sum === ok });
}
