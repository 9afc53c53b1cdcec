package nbdexport_test

import (
	"slices"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// ordered is a backend that knows which writes have returned before a flush began: these it makes durable.
type ordered struct {
	*nbdtest.Memory
	mu                sync.Mutex
	returned, durable []int64 // offsets of writes
}

func (o *ordered) WriteAt(p []byte, off int64) (int, error) {
	n, err := o.Memory.WriteAt(p, off)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.returned = append(o.returned, off)
	return n, err
}

func (o *ordered) Flush() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.durable = slices.Clone(o.returned)
	return nil
}

// TestFlushCoversAllConnections writes on several connections and flushes on one of them: what had been acknowledged
// anywhere is durable. So the export may say that it can do this.
func TestFlushCoversAllConnections(t *testing.T) {
	const clients, rounds = 4, 50
	b := &ordered{Memory: nbdtest.NewMemory(nbdexport.Info{Size: mib, MultiConn: true})}
	addr := nbdtest.Serve(t, "unix", offer(b))
	var conns []*nbdtest.Client
	for i := range clients {
		conns = append(conns, nbdtest.Dial(t, addr))
		if e := conns[i].GoIn(nbdtest.Styles[i%3], ""); e.Flags&nbdexport.FlagCanMultiConn == 0 {
			t.Errorf("flags %#x", e.Flags)
		}
	}
	var acknowledged []int64
	for round := range rounds {
		for i, client := range conns {
			off := int64(round*clients+i) * 512
			if err := client.WriteBytes(uint64(off), make([]byte, 512)); err != nil {
				t.Fatal(err)
			}
			acknowledged = append(acknowledged, off)
		}
		if _, err := conns[round%clients].Do(nbdtest.Request{Command: nbdtest.CmdFlush}); err != nil {
			t.Fatal(err)
		}
		b.mu.Lock()
		durable := slices.Clone(b.durable)
		b.mu.Unlock()
		if !slices.Equal(durable, acknowledged) {
			t.Fatalf("round %d: %d writes are durable, %d were acknowledged", round, len(durable), len(acknowledged))
		}
	}
	// And what one connection wrote all others read.
	if err := conns[0].WriteBytes(0, []byte("one")); err != nil {
		t.Fatal(err)
	}
	for _, client := range conns[1:] {
		if got, err := client.ReadBytes(0, 3); err != nil || string(got) != "one" {
			t.Errorf("read %q, %v", got, err)
		}
	}
}

// TestSeveralExports writes to several exports at the same time. None sees anything of another.
func TestSeveralExports(t *testing.T) {
	var config nbdexport.Config
	names := []string{"", "a", "b", "a/b", "ä", "a b?c=d"}
	for _, name := range names {
		config.Exports = append(config.Exports, nbdexport.Export{Name: name, Backend: newMemory(mib)})
	}
	addr := nbdtest.Serve(t, "unix", config)
	var all sync.WaitGroup
	for i, name := range names {
		client := nbdtest.Dial(t, addr)
		all.Go(func() {
			client.GoIn(nbdtest.Styles[i%3], name)
			for off := range uint64(64) {
				if err := client.WriteBytes(off*512, []byte(name+"!")); err != nil {
					t.Error(err)
				}
			}
			client.Disconnect()
		})
	}
	all.Wait()
	for _, name := range names {
		client := nbdtest.Dial(t, addr)
		client.Go(name)
		if got, err := client.ReadBytes(63*512, len(name)+1); err != nil || string(got) != name+"!" {
			t.Errorf("export %q holds %q, %v", name, got, err)
		}
		client.Disconnect()
	}
}
