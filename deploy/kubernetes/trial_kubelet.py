"""Stands in for a kubelet in trial.sh: the pods of a namespace become processes of
this machine, each at an address of its own. Probes of readiness, SIGTERM and the end
of a pod are those of a kubelet; there are no containers.

    trial_kubelet.py NAMESPACE VERVE DIR     # VERVE_ variables go before those of the pods
"""

import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request

namespace, program, directory = sys.argv[1:]
server = "https://192.0.2.1:6443/api/v1/namespaces/" + namespace + "/"
unverified = ssl._create_unverified_context()


def call(method, path, body=None, kind="application/json"):
    request = urllib.request.Request(server + path, json.dumps(body).encode() if body else None,
                                     {"Authorization": "Bearer token", "Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, context=unverified, timeout=30) as answer:
        return json.load(answer)


class Pod:
    def __init__(self, pod, address):
        self.path = "pods/" + pod["metadata"]["name"]
        self.name, self.uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        self.address, self.ready, self.probed, self.stopping = address, None, 0, False
        container = pod["spec"]["containers"][0]
        self.period = container["readinessProbe"]["periodSeconds"]
        subprocess.check_call(["ip", "address", "add", address + "/32", "dev", "lo"])
        self.process = subprocess.Popen([program], env=self.environment(container),
                                        stderr=open(f"{directory}/{self.name}.log", "a"))

    def environment(self, container):
        variables = {}
        for source in container["envFrom"]:
            variables |= call("GET", "configmaps/" + source["configMapRef"]["name"])["data"]
        for variable in container["env"]:
            # The only field that the manifests name is metadata.name.
            variables[variable["name"]] = variable.get("value", self.name)
        variables |= {name: value for name, value in os.environ.items() if name.startswith("VERVE_")}
        return variables | {"VERVE_DATA_DIR": f"{directory}/data-{self.name}",
                            "VERVE_LISTEN": self.address + ":8080", "VERVE_ADMIN_LISTEN": self.address + ":8081"}

    def probe(self):
        if time.monotonic() < self.probed + self.period and self.ready is not None:
            return
        self.probed = time.monotonic()
        try:
            ready = urllib.request.urlopen(f"http://{self.address}:8081/readyz", timeout=2).status == 200
        except OSError:
            ready = False
        if ready != self.ready:
            self.ready = ready
            conditions = [{"type": kind, "status": str(ready)} for kind in ("Ready", "ContainersReady")]
            call("PATCH", self.path + "/status", {"status": {"phase": "Running", "podIP": self.address, "podIPs": [{"ip": self.address}],
                                                             "conditions": conditions}}, "application/strategic-merge-patch+json")

    def look(self, deleted):
        if self.process.poll() is not None:
            print(f"{self.name} at {self.address} ended with exit code {self.process.returncode}", flush=True)
            call("DELETE", self.path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})
            return False
        if deleted and not self.stopping:
            self.stopping = True
            self.process.terminate()
        self.probe()
        return True


pods, started = {}, 0
while True:
    for item in call("GET", "pods")["items"]:
        metadata = item["metadata"]
        if "nodeName" not in item["spec"]:
            call("POST", "pods/" + metadata["name"] + "/binding", {"metadata": {"name": metadata["name"]}, "target": {"kind": "Node", "name": "node"}})
            continue
        if metadata["uid"] not in pods:
            started += 1
            pods[metadata["uid"]] = Pod(item, f"10.244.0.{started}")
        pod = pods[metadata["uid"]]
        if pod and not pod.look("deletionTimestamp" in metadata):
            pods[metadata["uid"]] = None
    time.sleep(0.2)
