// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package version

import (
	"runtime/debug"
	"testing"
)

func TestRead(t *testing.T) {
	revision := []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: "0123456789abcdef0123"}}
	for name, tc := range map[string]struct {
		info    debug.BuildInfo
		release string
		commit  string
		want    string
	}{
		"a clone":             {debug.BuildInfo{Main: debug.Module{Path: Module, Version: "v1.2.3"}, Settings: revision}, "", "", "v1.2.3 (0123456789ab, go1.26)"},
		"go install":          {debug.BuildInfo{Main: debug.Module{Path: Module, Version: "v1.2.3"}}, "", "", "v1.2.3 (go1.26)"},
		"a release":           {debug.BuildInfo{Main: debug.Module{Path: Module, Version: "(devel)"}, Settings: revision}, "v1.2.4", "", "v1.2.4 (0123456789ab, go1.26)"},
		"an archive":          {debug.BuildInfo{Main: debug.Module{Path: Module, Version: "(devel)"}}, "v1.2.4", "fedcba9876543210", "v1.2.4 (fedcba987654, go1.26)"},
		"our second module":   {debug.BuildInfo{Main: debug.Module{Path: Module + "/redis", Version: "v9"}, Deps: []*debug.Module{{Path: Module, Version: "v1.2.3"}}, Settings: revision}, "", "", "v1.2.3 (0123456789ab, go1.26)"},
		"xcaddy":              {debug.BuildInfo{Main: debug.Module{Path: "caddy"}, Deps: []*debug.Module{{Path: Module, Version: "v1.2.3"}}, Settings: revision}, "", "", "v1.2.3 (go1.26)"},
		"a similar name":      {debug.BuildInfo{Main: debug.Module{Path: Module + "2"}, Settings: revision}, "", "", "(devel) (go1.26)"},
		"no version":          {debug.BuildInfo{Main: debug.Module{Path: Module}}, "", "", "(devel) (go1.26)"},
		"a short commit":      {debug.BuildInfo{Main: debug.Module{Path: Module}, Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "12"}}}, "", "", "(devel) (12, go1.26)"},
		"no such information": {debug.BuildInfo{}, "", "", "(devel) (go1.26)"},
	} {
		tc.info.GoVersion = "go1.26"
		if got := read(&tc.info, tc.release, tc.commit).String(); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
	if got := Read().Go; got == "" {
		t.Error("a test's own version of Go is unknown")
	}
}
