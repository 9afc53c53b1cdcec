package mount

import (
	"reflect"
	"testing"
)

func TestParseTable(t *testing.T) {
	const text = `22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 / /with\040space\134and\043more rw,noatime master:1 shared:2 - ext4 /dev/nbd0 rw,data=ordered
42 27 0:39 / /tmp/m rw,relatime - tmpfs  rw
43 27 0:6 /loop0 /tmp/node ro,nosuid - devtmpfs devtmpfs rw,mode=755
`
	want := []entry{
		{0, 21, "/", "/proc", []string{"rw", "relatime"}, "proc", "proc", []string{"rw"}},
		{98, 0, "/", `/with space\and#more`, []string{"rw", "noatime"}, "ext4", "/dev/nbd0", []string{"rw", "data=ordered"}},
		{0, 39, "/", "/tmp/m", []string{"rw", "relatime"}, "tmpfs", "", []string{"rw"}},
		{0, 6, "/loop0", "/tmp/node", []string{"ro", "nosuid"}, "devtmpfs", "devtmpfs", []string{"rw", "mode=755"}},
	}
	got, err := parseTable(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParseTableRefusesMalformedLines(t *testing.T) {
	for _, line := range []string{
		"\n",
		"22 27 0:21 / /proc rw,relatime proc proc rw",
		"22 27 0:21 / /proc rw,relatime - proc proc",
		"22 27 - / /proc rw,relatime proc proc rw",
		"22 27 021 / /proc rw,relatime - proc proc rw",
		"22 27 a:b / /proc rw,relatime - proc proc rw",
	} {
		if got, err := parseTable(line); err == nil {
			t.Errorf("line %q: %+v", line, got)
		}
	}
}
