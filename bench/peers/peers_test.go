// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package peers

import (
	"bytes"
	"io/fs"
	"strings"
	"testing"
)

// TestExpand checks that all configurations are whole, that they listen on the loopback
// interface only, and that logs make a difference exactly where they should.
func TestExpand(t *testing.T) {
	names, err := fs.Glob(files, "*")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	withoutLogs := "storage.config ip_allow.yaml runroot.yaml logging.yaml"
	for _, name := range names {
		values := Values{Port: 4321, Origin: "127.0.0.1:1234", Work: "/work", Log: true}
		on, err := Expand(name, values)
		if err != nil {
			t.Fatal(err)
		}
		values.Log = false
		off, err := Expand(name, values)
		if err != nil {
			t.Fatal(err)
		}
		if same := strings.Contains(withoutLogs, name); bytes.Equal(on, off) != same {
			t.Errorf("%s with and without logs:\n%s\n%s", name, on, off)
		}
		if !strings.HasPrefix(string(on), "# ") {
			t.Errorf("%s does not say what it is for", name)
		}
		if bytes.Contains(on, []byte("4321")) && !bytes.Contains(on, []byte("127.0.0.1")) {
			t.Errorf("%s listens everywhere", name)
		}
	}
}
