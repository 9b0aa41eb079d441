// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestContribNamesMetrics: boards and rules ask for metrics and labels that there
// are, and the board shows each of them.
func TestContribNamesMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	if err := registerMetrics(registry); err != nil {
		t.Fatal(err)
	}
	metrics.refusals.WithLabelValues(deniedRequest)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, family := range families {
		names = append(names, family.GetName())
	}
	asked := func(file string) []string {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(file, ".json") && !json.Valid(data) {
			t.Errorf("%s is no JSON", file)
		}
		var list []string
		for _, name := range regexp.MustCompile(`caddy_async_proxy_\w+`).FindAllString(string(data), -1) {
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				name = strings.TrimSuffix(name, suffix)
			}
			if !slices.Contains(names, name) {
				t.Errorf("%s asks for %s, which there is not", file, name)
			}
			list = append(list, name)
		}
		return list
	}
	shown := asked("contrib/grafana/async_proxy.json")
	for _, name := range names {
		if !slices.Contains(shown, name) {
			t.Errorf("the board does not show %s", name)
		}
	}
	asked("contrib/prometheus/rules.yml")
	asked("contrib/prometheus/tests.yml")
}

func TestContribRules(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("there is no promtool; apt-get install prometheus")
	}
	for _, args := range [][]string{{"check", "rules", "rules.yml"}, {"test", "rules", "tests.yml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = "contrib/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}
