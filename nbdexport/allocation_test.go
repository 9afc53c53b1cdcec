package nbdexport_test

import (
	"io"
	"net"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// TestNoAllocationPerRequest has a warm connection: serving must go on when the kernel, which may be writing back to
// this very export, has no memory to give.
func TestNoAllocationPerRequest(t *testing.T) {
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		b := nbdtest.NewMemory(nbdexport.Info{Size: mib, FastZero: true})
		client := connectIn(t, style, b)
		for name, r := range map[string]nbdtest.Request{
			"read":        {Command: nbdtest.CmdRead, Length: 4096},
			"long read":   {Command: nbdtest.CmdRead, Length: 256 << 10},
			"hole":        {Command: nbdtest.CmdRead, Offset: 512 << 10, Length: 4096},
			"write":       {Command: nbdtest.CmdWrite, Length: 4096, Payload: make([]byte, 4096)},
			"long write":  {Command: nbdtest.CmdWrite, Length: 256 << 10, Payload: make([]byte, 256<<10)},
			"FUA write":   {Command: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Length: 4096, Payload: make([]byte, 4096)},
			"trim":        {Command: nbdtest.CmdTrim, Offset: 768 << 10, Length: 4096},
			"zeroes":      {Command: nbdtest.CmdWriteZeroes, Offset: 768 << 10, Length: 4096},
			"fast zeroes": {Command: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFastZero, Offset: 768 << 10, Length: 4096},
			"cache":       {Command: nbdtest.CmdCache, Length: 4096},
			"flush":       {Command: nbdtest.CmdFlush},
			"refused":     {Command: nbdtest.CmdRead, Offset: mib, Length: 4096},
		} {
			if err := client.WriteBytes(0, make([]byte, 256<<10)); err != nil { // data, no hole
				t.Fatal(err)
			}
			request := r.EncodeIn(style)
			counted := &counting{Conn: client.Conn}
			client.Conn = counted
			client.Exchange(r)
			client.Conn = counted.Conn
			reply := make([]byte, counted.received) // all are as long as the first
			n := testing.AllocsPerRun(200, func() {
				if _, err := client.Write(request); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(client, reply); err != nil {
					t.Fatal(err)
				}
			})
			if n != 0 {
				t.Errorf("%s: %v allocations for a request", name, n)
			}
		}
	})
}

// counting is a connection that counts what it receives.
type counting struct {
	net.Conn
	received int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received += n
	return n, err
}
