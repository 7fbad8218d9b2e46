-- A registry as version 1 of the schema wrote it: two builds of one family and device, and one of another.
PRAGMA journal_mode = WAL;
PRAGMA application_id = 1802264947;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE builds (
    id INTEGER PRIMARY KEY,
    family TEXT NOT NULL, device TEXT NOT NULL,
    weights TEXT NOT NULL, dataset TEXT NOT NULL, data_fingerprint TEXT NOT NULL,
    command TEXT NOT NULL, settings TEXT NOT NULL, versions TEXT NOT NULL, hardware TEXT NOT NULL,
    started_at TEXT NOT NULL, finished_at TEXT NOT NULL,
    current INTEGER NOT NULL CHECK (current IN (0, 1))
);
INSERT INTO "builds" VALUES(1,'deit-micro','cpu','pretrained','50 images of clouds','c10d5','klas-zoo build --family deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-01T00:00:00+00:00',0);
INSERT INTO "builds" VALUES(2,'deit-micro','cpu','pretrained','50 images of clouds','c10d5','klas-zoo build deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-02T03:14:05+00:00',1);
INSERT INTO "builds" VALUES(3,'deit-micro','a100','pretrained','50 images of clouds','c10d5','klas-zoo build deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-02T03:14:05+00:00',1);
CREATE TABLE engines (
    id INTEGER PRIMARY KEY,
    build_id INTEGER NOT NULL REFERENCES builds (id),
    route TEXT NOT NULL, runtime TEXT NOT NULL, precision TEXT NOT NULL,
    sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    macs INTEGER NOT NULL, parameters INTEGER NOT NULL, input_shape TEXT NOT NULL,
    top1 REAL NOT NULL, images INTEGER NOT NULL, verification TEXT NOT NULL
);
INSERT INTO "engines" VALUES(1,1,'[["old", 1, 4]]','onnxruntime','fp32','cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4',3,1000000,5000,'[3, 8, 8]',60.0,50,'{"images": 50, "max_abs_difference": 1e-05, "min_agreement": 0.99, "tolerance": 0.001, "top1_agreement": 1.0}');
INSERT INTO "engines" VALUES(2,2,'[["tiny", 1, 4]]','onnxruntime','fp32','8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c',4,1000000,5000,'[3, 8, 8]',70.0,50,'{"images": 50, "max_abs_difference": 1e-05, "min_agreement": 0.99, "tolerance": 0.001, "top1_agreement": 1.0}');
INSERT INTO "engines" VALUES(3,2,'[["small", 1, 4]]','onnxruntime','fp32','81db8ebbbbc69c6c6ad4a6aa92b76e0c08af547da236b9e2c9dbe1d8285a8130',5,1000000,5000,'[3, 8, 8]',75.0,50,'{"images": 50, "max_abs_difference": 1e-05, "min_agreement": 0.99, "tolerance": 0.001, "top1_agreement": 1.0}');
INSERT INTO "engines" VALUES(4,2,'[["base", 1, 4]]','onnxruntime','fp32','cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2',4,1000000,5000,'[3, 8, 8]',80.0,50,'{"images": 50, "max_abs_difference": 1e-05, "min_agreement": 0.99, "tolerance": 0.001, "top1_agreement": 1.0}');
INSERT INTO "engines" VALUES(5,3,'[["tiny", 1, 4]]','onnxruntime','fp32','8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c',4,1000000,5000,'[3, 8, 8]',70.0,50,'{"images": 50, "max_abs_difference": 1e-05, "min_agreement": 0.99, "tolerance": 0.001, "top1_agreement": 1.0}');
CREATE TABLE latencies (
    engine_id INTEGER NOT NULL REFERENCES engines (id),
    device TEXT NOT NULL, hardware TEXT NOT NULL,
    runtime TEXT NOT NULL, runtime_version TEXT NOT NULL, provider TEXT NOT NULL, precision TEXT NOT NULL,
    threads INTEGER NOT NULL, batch INTEGER NOT NULL, shape TEXT NOT NULL, runs INTEGER NOT NULL,
    min_ms REAL NOT NULL, p50_ms REAL NOT NULL, p90_ms REAL NOT NULL, p99_ms REAL NOT NULL,
    coefficient_of_variation REAL NOT NULL, origin TEXT NOT NULL, measured_at TEXT NOT NULL,
    PRIMARY KEY (engine_id, batch)
);
INSERT INTO "latencies" VALUES(1,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,1,'[1, 3, 8, 8]',30,3.6,4.0,4.4,6.0,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(2,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,1,'[1, 3, 8, 8]',30,0.9,1.0,1.1,1.5,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(2,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,8,'[8, 3, 8, 8]',30,4.5,5.0,5.5,7.5,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(3,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,1,'[1, 3, 8, 8]',30,1.8,2.0,2.2,3.0,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(3,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,8,'[8, 3, 8, 8]',30,5.4,6.0,6.6000000000000005329e+00,9.0,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(4,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,1,'[1, 3, 8, 8]',30,2.7,3.0,3.30000000000000026645e+00,4.5,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(4,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,8,'[8, 3, 8, 8]',30,6.3,7.0,7.70000000000000106581e+00,10.5,0.02,'measured','2026-01-02T03:04:05+00:00');
INSERT INTO "latencies" VALUES(5,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','fp32',1,1,'[1, 3, 8, 8]',30,0.9,1.0,1.1,1.5,0.02,'measured','2026-01-02T03:04:05+00:00');
CREATE UNIQUE INDEX one_current_build ON builds (family, device) WHERE current;
CREATE INDEX engines_of_a_build ON engines (build_id);
COMMIT;
