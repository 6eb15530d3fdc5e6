// A steady load of new ids and repeats, below what the server can do.
//
//   k6 run bench/k6/load.js
//   k6 run -e URL=http://10.0.0.5:8080 -e RATE=20000 -e DUPLICATES=0.9 bench/k6/load.js
//
// RATE      requests a second          1000
// DURATION  how long                   1m
// VUS       virtual users to begin with 100
//
// k6 spends about ten times the CPU on a request that the server does: give it
// a machine of its own, and for the server's limits see bench/http.
import { accept, setup, steady, unhurried } from './accept.js';

export { setup };
export default accept;

export const options = {
  scenarios: { load: steady(1000, '1m', 100) },
  thresholds: unhurried,
};
