package main

import (
	"maps"
	"testing"
)

func TestOptionList(t *testing.T) {
	for s, want := range map[string]optionList{
		"a=b":             {"a": "b"},
		"a=b,c=d=e":       {"a": "b", "c": "d=e"},
		"a=b,,c,d=":       {"a": "b,c", "d": ""},
		"a=,,,b=,,x,,,,y": {"a": ",", "b": ",x,,y"},
		"a=1,a=2":         {"a": "2"},
	} {
		got := optionList{}
		if err := got.Set(s); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q is %q, %v; want %q", s, got, err, want)
		}
		again := optionList{}
		if err := again.Set(got.String()); err != nil || !maps.Equal(got, again) {
			t.Errorf("%q becomes %q, %v", got, again, err)
		}
	}
	for _, s := range []string{"", "a", "=b", "a=b,", ",", "a=b,c"} {
		if err := (optionList{}).Set(s); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
	sum := optionList{"x": "1"}
	if err := sum.Set("y=2"); err != nil || len(sum) != 2 {
		t.Errorf("%q, %v", sum, err)
	}
}
