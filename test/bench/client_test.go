package main

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseFio(t *testing.T) {
	const good = "fio: connected to NBD server\n" + `{"fio version": "fio-3.33", "jobs": [{"error": 0, "read": {"total_ios": 0},
		"mixed": {"total_ios": 10, "iops": 5.5, "bw_bytes": 3000000, "clat_ns": {"percentile": {"50.000000": 7000, "99.000000": 9000}}}}]}`
	if f, err := parseFio([]byte(good)); err != nil || f != (figures{10, 5.5, 3, 7, 9}) {
		t.Errorf("%+v, %v", f, err)
	}
	for name, out := range map[string]string{
		"nothing":      "",
		"no JSON":      "fio: connected to NBD server\n",
		"half a JSON":  good[:80],
		"no jobs":      `{"jobs": []}`,
		"an error":     strings.Replace(good, `"error": 0`, `"error": 5`, 1),
		"nothing done": strings.Replace(good, `"total_ios": 10`, `"total_ios": 0`, 1),
	} {
		if f, err := parseFio([]byte(out)); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestParseLoad(t *testing.T) {
	const good = `{"reads": 6, "writes": 4, "errors": 0, "iops": 5.5, "mb_per_second": 3, "latency_us": {"p50": 7, "p99": 9}}`
	if f, err := parseClient("load", []byte(good), 0, 0); err != nil || f != (figures{10, 5.5, 3, 7, 9}) {
		t.Errorf("%+v, %v", f, err)
	}
	for _, out := range []string{"", "{}", strings.Replace(good, `"errors": 0`, `"errors": 1`, 1)} {
		if f, err := parseLoad([]byte(out)); err == nil {
			t.Errorf("%q: %+v", out, f)
		}
	}
}

func TestParseCopy(t *testing.T) {
	f, err := parseClient("nbdcopy", nil, 1<<30, 2*time.Second)
	if err != nil || f.Requests != 4096 || f.IOPS != 2048 || f.MBs < 536 || f.MBs > 537 {
		t.Errorf("%+v, %v", f, err)
	}
}

// TestClientCommands looks at what differs between clients, workloads and servers.
func TestClientCommands(t *testing.T) {
	o, err := parseOptions([]string{"-full", "-runtime", "1500ms"})
	if err != nil {
		t.Fatal(err)
	}
	named := func(name string) workload {
		return workloads[slices.IndexFunc(workloads, func(w workload) bool { return w.Name == name })]
	}
	raw := server{Name: "raw", Family: limit}
	for _, c := range []struct {
		row  row
		s    server
		want string
	}{
		{row{Workload: named("allocating write 4k"), Depth: 16, Connections: 4, Client: "load"}, server{}, "-uri nbd+unix:///?socket=SOCKET -rw randwrite -mix 70 -bs 4096 -align 65536 -size 68719476736 -depth 16 -connections 4 -runtime 1.5s -json -distinct"},
		{row{Workload: named("random read 4k"), Depth: 1, Connections: 1, Client: "load"}, raw, "-file IMAGE -rw randread"},
		{row{Workload: named("mixed 70/30 4k"), Depth: 16, Connections: 4, Client: "fio"}, server{}, "--rw=randrw --rwmixread=70 --bs=4096 --blockalign=4096 --size=1073741824 --norandommap --iodepth=16 --numjobs=4 --time_based --runtime=1 "},
		{row{Workload: named("sequential read 1M"), Depth: 16, Connections: 4, Client: "fio"}, server{}, "--offset_increment=268435456 --rw=read --rwmixread=70 --bs=1048576 --blockalign=1048576 --size=268435456 "},
		{row{Workload: named("random read 4k"), Depth: 16, Connections: 4, Client: "fio"}, raw, "--ioengine=psync --filename=IMAGE"},
		{row{Workload: named("random read 4k"), Depth: 16, Connections: 4, Client: "fio"}, raw, "--iodepth=1 --numjobs=16 "},
		{row{Workload: named("nbdcopy in"), Client: "nbdcopy"}, server{}, "nbdcopy FILE nbd+unix:///?socket=SOCKET"},
		{row{Workload: named("nbdcopy out"), Client: "nbdcopy"}, raw, "nbdcopy IMAGE FILE"},
	} {
		if got := strings.Join(c.row.client(o, c.s), " "); !strings.Contains(got, c.want) {
			t.Errorf("%s: no %q in %q", c.row, c.want, got)
		}
	}
}
