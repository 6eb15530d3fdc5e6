package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// cluster is a Redis Cluster of three masters, each with a replica: of nodes[i] in
// nodes[i+3] at the start. Nothing is saved, so a node that ends has lost its data.
type cluster struct {
	t     *testing.T
	nodes []*clusterNode
}

// clusterNode is a server of a cluster. It keeps its place in the cluster over a restart.
type clusterNode struct {
	addr, port, bus, id string

	exe  string
	args []string
	cmd  *exec.Cmd
}

// startCluster starts a cluster and waits until its replicas follow.
func startCluster(t *testing.T, nodeTimeout time.Duration) *cluster {
	t.Helper()
	exe := testproc.Needs(t, "redis-server", "redis")
	testproc.Needs(t, "redis-cli", "redis")
	c := &cluster{t: t}
	for range 6 {
		addr, bus := testproc.FreeAddr(t), testproc.FreeAddr(t)
		_, port, _ := net.SplitHostPort(addr)
		_, busPort, _ := net.SplitHostPort(bus)
		n := &clusterNode{addr: addr, port: port, bus: busPort, exe: exe, args: []string{
			"--bind", "127.0.0.1", "--port", port, "--cluster-port", busPort,
			"--cluster-enabled", "yes", "--cluster-node-timeout", fmt.Sprint(nodeTimeout.Milliseconds()),
			"--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0", "--cluster-allow-replica-migration", "no",
			"--repl-diskless-sync-delay", "0", "--save", "", "--dir", t.TempDir(), "--logfile", "log",
		}}
		t.Cleanup(n.kill)
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
		n.id = redisCLI(t, addr, "CLUSTER", "MYID")
		c.nodes = append(c.nodes, n)
	}
	for i, n := range c.nodes[:3] {
		redisCLI(t, n.addr, "CLUSTER", "ADDSLOTSRANGE", fmt.Sprint(i*16384/3), fmt.Sprint((i+1)*16384/3-1))
	}
	for i, n := range c.nodes {
		redisCLI(t, n.addr, "CLUSTER", "SET-CONFIG-EPOCH", fmt.Sprint(i+1))
		if i > 0 {
			redisCLI(t, c.nodes[0].addr, "CLUSTER", "MEET", "127.0.0.1", n.port, n.bus)
		}
	}
	testproc.Until(t, "all nodes know each other", func() bool {
		for _, n := range c.nodes {
			if strings.Count(redisCLI(t, n.addr, "CLUSTER", "NODES"), "connected") < 6 {
				return false
			}
		}
		return true
	})
	for i, n := range c.nodes[3:] {
		redisCLI(t, n.addr, "CLUSTER", "REPLICATE", c.nodes[i].id)
	}
	testproc.Until(t, "replicas follow", func() bool { return c.ailment() == "" })
	return c
}

// start starts the node, also again, and waits until it listens.
func (n *clusterNode) start() error {
	n.cmd = exec.Command(n.exe, n.args...)
	if err := n.cmd.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		nc, err := net.Dial("tcp", n.addr)
		if err == nil {
			return nc.Close()
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

// kill ends the node at once.
func (n *clusterNode) kill() {
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait() // killed
}

func (n *clusterNode) signal(s os.Signal) { _ = n.cmd.Process.Signal(s) }

// ask sends a command and returns the answer: empty if none comes within seconds.
func (n *clusterNode) ask(command ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "redis-cli", append([]string{"-p", n.port}, command...)...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// shard is a master and its replica.
type shard struct{ master, replica *clusterNode }

// shards are the masters that have slots, with their replicas, as the nodes see themselves.
func (c *cluster) shards() (all []shard) {
	of := map[string]*clusterNode{} // by the port of the master
	for _, n := range c.nodes {
		if role := strings.Fields(n.ask("ROLE")); len(role) > 2 && role[0] == "slave" {
			of[role[2]] = n
		}
	}
	for _, n := range c.nodes {
		if strings.HasPrefix(n.ask("ROLE"), "master") && of[n.port] != nil {
			all = append(all, shard{n, of[n.port]})
		}
	}
	return all
}

// ailment is what keeps the cluster from being well; empty if it is.
func (c *cluster) ailment() string {
	for _, n := range c.nodes {
		info := n.ask("CLUSTER", "INFO")
		if !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, "cluster_slots_ok:16384") {
			return n.addr + " is not well: " + info
		}
	}
	shards := c.shards()
	if len(shards) != 3 {
		return fmt.Sprintf("%d masters have replicas", len(shards))
	}
	for _, s := range shards {
		if !strings.Contains(s.master.ask("INFO", "replication"), "state=online") {
			return s.master.addr + " has no replica that follows"
		}
		if !strings.Contains(s.replica.ask("INFO", "replication"), "master_link_status:up") {
			return s.replica.addr + " does not follow"
		}
	}
	return ""
}

// owner is the master that has a slot, nil if that is not known.
func (c *cluster) owner(slot int) *clusterNode {
	for _, s := range c.shards() {
		for _, part := range strings.Fields(ownLine(s.master.ask("CLUSTER", "NODES"))) {
			from, to, some := strings.Cut(part, "-")
			if !some {
				to = from
			}
			low, err := strconv.Atoi(from)
			high, err2 := strconv.Atoi(to)
			if err == nil && err2 == nil && low <= slot && slot <= high {
				return s.master
			}
		}
	}
	return nil
}

// ownLine is the slots of the node that gave this answer to CLUSTER NODES.
func ownLine(nodes string) string {
	for line := range strings.Lines(nodes) {
		if f := strings.Fields(line); len(f) > 8 && strings.Contains(f[2], "myself") {
			return strings.Join(f[8:], " ")
		}
	}
	return ""
}

// move begins or goes on to move a slot to another master, key by key, and reports whether it
// is there.
func (c *cluster) move(slot int, to *clusterNode, slowly bool) bool {
	from, n := c.owner(slot), strconv.Itoa(slot)
	if from != nil && from != to { // without an owner there is nothing to move: a move was cut short
		to.ask("CLUSTER", "SETSLOT", n, "IMPORTING", from.id)
		from.ask("CLUSTER", "SETSLOT", n, "MIGRATING", to.id)
		for range 1000 {
			keys := strings.Fields(from.ask("CLUSTER", "GETKEYSINSLOT", n, "1"))
			if len(keys) != 1 || strings.HasPrefix(keys[0], "ERR") {
				break
			}
			if out := from.ask("MIGRATE", "127.0.0.1", to.port, keys[0], "0", "1000", "REPLACE"); out != "OK" && out != "NOKEY" {
				return false
			}
			if slowly {
				time.Sleep(rand.N(100 * time.Millisecond))
			}
		}
		if left := from.ask("CLUSTER", "COUNTKEYSINSLOT", n); left != "0" {
			return false
		}
	}
	// The one that gets it first, or nobody has it for a moment.
	all := slices.Clone(c.nodes)
	slices.SortStableFunc(all, func(a, b *clusterNode) int {
		rank := func(x *clusterNode) int { return slices.Index([]*clusterNode{to, from}, x) & 3 }
		return rank(a) - rank(b)
	})
	for _, node := range all {
		if strings.HasPrefix(node.ask("ROLE"), "master") {
			node.ask("CLUSTER", "SETSLOT", n, "NODE", to.id)
		}
	}
	return c.owner(slot) == to
}
